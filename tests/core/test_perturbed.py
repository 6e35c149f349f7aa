"""A simulated step in other weights than those that train: w′ = (w, v − α·∇ᵥh/(‖∇ᵥh‖ + ε))."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from torch_booster import BoosterOptimizer

ALPHA, LAM = 0.7, 3.0
NORMS = ("global", "tensor")


class Adapted(nn.Module):
    """Two frozen layers, each with a low-rank correction that trains."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.base = nn.ParameterList([weight(6, 5), weight(3, 6)]).requires_grad_(False)
        self.down = nn.ParameterList([weight(2, 5), weight(2, 6)])
        self.up = nn.ParameterList([weight(6, 2), weight(3, 2)])

    @property
    def trained(self) -> list[Tensor]:
        return [*self.down, *self.up]

    def forward(self, x: Tensor) -> Tensor:
        for w, a, b in zip(self.base, self.down, self.up, strict=True):
            x = torch.tanh(x @ (w + b @ a).T)
        return x


def targets(model: nn.Module, seed: int, times: float = 1.0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 3, generator=generator, dtype=torch.float64)

    def closure() -> Tensor:
        loss = times * (model(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


def boosted(model: Adapted, perturbed: Any = None, **more: Any) -> BoosterOptimizer:
    base = torch.optim.SGD(model.trained, lr=0.1)
    return BoosterOptimizer(base, LAM, ALPHA, eps=0.0, perturbed=perturbed, **more)


def gradient(model: Adapted, seed: int, of: Sequence[Tensor]) -> list[Tensor]:
    """∇h of any weights, frozen or not, by a twin whose weights all train."""
    names = {p: n for n, p in model.named_parameters()}
    twin = copy.deepcopy(model).requires_grad_()
    targets(twin, seed)()
    made = {n: p.grad for n, p in twin.named_parameters()}
    return [g for p in of if (g := made[names[p]]) is not None]


def formula(model: Adapted, moves: Sequence[Tensor], norm: str) -> list[Tensor]:
    """∇f + λ·(∇h(w, v) − ∇h(w, v′)) of the weights that train, one tensor after the other."""
    f, h = (gradient(model, seed, model.trained) for seed in (1, 2))
    along = gradient(model, 2, moves)
    whole = sum(float(g.square().sum()) for g in along) ** 0.5
    names = {p: n for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    for v, g in zip(moves, along, strict=True):
        length = whole if norm == "global" else float(g.norm()) * len(moves) ** 0.5
        twin.get_parameter(names[v]).data -= ALPHA * g / length
    there = gradient(twin, 2, twin.trained)
    return [a + LAM * (b - c) for a, b, c in zip(f, h, there, strict=True)]


def chosen(model: Adapted, which: str) -> list[Tensor]:
    return {
        "base": [*model.base],
        "one of them": [model.base[1]],
        "base and adapter": [*model.base, *model.trained],
        "a part of the adapter": [*model.up],
    }[which]


CHOICES = ("base", "one of them", "base and adapter", "a part of the adapter")


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", CHOICES)
@given(seed=st.integers(0, 2**31))
def test_the_gradient_is_the_formulas(which: str, norm: str, accumulates: bool, seed: int) -> None:
    model = Adapted(seed)
    moves = chosen(model, which)
    wanted = formula(model, moves, norm)
    opt = boosted(model, moves, norm=norm, accumulates=accumulates)
    opt.zero_grad()
    opt.backward(targets(model, 1), targets(model, 2))
    for p, g in zip(model.trained, wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-9)
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(ALPHA)


@pytest.mark.parametrize("norm", NORMS)
def test_all_that_trains_is_the_default(norm: str) -> None:
    runs = []
    for told in (False, True):
        model = Adapted()
        opt = boosted(model, model.trained if told else None, norm=norm)
        for _ in range(3):
            opt.zero_grad()
            opt.step(targets(model, 1), targets(model, 2))
        runs.append(model.trained)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_are_asked_for_a_gradient_in_the_first_pass_alone() -> None:
    model = Adapted()
    opt = boosted(model, [*model.base], self_check=False)
    asked, seen = [], []

    def harmful() -> Tensor:
        asked.append([p.requires_grad for p in model.base])
        seen.append([p.detach().clone() for p in model.parameters()])
        return targets(model, 2)()

    model.base[0].grad = kept = torch.ones_like(model.base[0])
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    opt.step(targets(model, 1), harmful)
    assert asked == [[True, True], [False, False]]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], before, strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(seen[1], before, strict=True)]
    assert moved == [True, True, False, False, False, False]  # the base and nothing else
    assert not any(p.requires_grad for p in model.base)
    assert all(torch.equal(p, w) for p, w in zip(model.base, before, strict=False))
    assert torch.equal(model.base[0].grad, kept)
    assert model.base[1].grad is None


@pytest.mark.parametrize("fails_in", [1, 2, 3])
def test_whatever_a_closure_raises(fails_in: int) -> None:
    model = Adapted()
    opt = boosted(model, [*model.base])
    passes = 0

    def harmful() -> Tensor:
        nonlocal passes
        passes += 1
        if passes == fails_in:
            raise KeyboardInterrupt
        return targets(model, 2)()

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        opt.regularize(harmful)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in model.base)
    assert all(p.grad is None for p in model.parameters())


def test_alpha_zero_moves_nothing_and_lambda_zero_runs_nothing() -> None:
    model = Adapted()
    opt = boosted(model, [*model.base], self_check=False)
    opt.alpha = 0.0
    opt.regularize(targets(model, 2))
    assert not any(p.grad.any() for p in model.trained if p.grad is not None)
    opt.zero_grad()
    opt.lam = 0.0
    assert opt.regularize(pytest.fail) is None  # pyright: ignore[reportArgumentType]


def test_copies_of_the_optimizer_perturb_their_own_weights() -> None:
    model = Adapted()
    model, opt = copy.deepcopy((model, boosted(model, [*model.base])))
    assert [id(p) for p in opt.perturbed or ()] == [id(p) for p in model.base]


def test_frozen_weights_move_by_the_alpha_of_the_groups_or_else_the_optimizers() -> None:
    model = Adapted()
    groups = [{"params": [*model.down], "booster_alpha": 0.5}, {"params": [*model.up]}]
    base = torch.optim.SGD(groups, lr=0.1)
    opt = BoosterOptimizer(base, LAM, ALPHA, perturbed=model.base)
    opt.regularize(targets(model, 2))
    assert opt.read_diagnostics()["perturbation_norm"] == pytest.approx(ALPHA)
    opt.zero_grad()
    for group in opt.param_groups:
        group["booster_alpha"] = 2 * ALPHA
    opt.regularize(targets(model, 2))
    assert opt.read_diagnostics()["perturbation_norm"] == pytest.approx(2 * ALPHA)


def of_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


class Packed(nn.Parameter):
    """A weight of a type of its own, as those of torchao and of bitsandbytes are."""


SHARED = torch.ones(3)


@pytest.mark.parametrize(
    ("perturbed", "error", "said"),
    [
        ([], ValueError, "holds no weights"),
        (torch.ones(3), TypeError, "a list of tensors"),
        ({torch.ones(3)}, TypeError, "in an order"),
        (nn.Linear(2, 2), TypeError, "a list of tensors"),
        (5, TypeError, "got 5"),
        ([[torch.ones(3)]], TypeError, "Pass tensors"),
        ([("w", torch.ones(3))], TypeError, "without their names"),
        ([torch.ones(3, dtype=torch.int8)], ValueError, "quantised"),
        ([torch.ones(3).to(torch.float8_e4m3fn)], ValueError, "quantised"),
        ([Packed(torch.ones(3))], ValueError, r"of its own \(Packed\)"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "no leaf"),
        ([torch.ones(3, device="meta")], ValueError, "meta"),
        ([of_inference()], ValueError, "inference"),
        ([SHARED, SHARED.detach()], ValueError, "share their memory"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_refused(perturbed: Any, error: type[Exception], said: str, late: bool) -> None:
    model = Adapted()
    opt = boosted(model, model.base)
    with pytest.raises(error, match=said):
        setattr(opt, "perturbed", perturbed) if late else boosted(model, perturbed)
    assert opt.perturbed is not None
    assert [id(p) for p in opt.perturbed] == [id(p) for p in model.base]


def test_weights_that_are_named_twice_or_by_a_generator() -> None:
    model = Adapted()
    opt = boosted(model, (p for p in (*model.base, *model.base)))
    assert opt.perturbed is not None
    assert [id(p) for p in opt.perturbed] == [id(p) for p in model.base]


def test_weights_that_are_set_later_are_looked_at() -> None:
    """In bfloat16 next to nothing of the step is left, of which the first regulariser tells."""
    model = Adapted().float()
    model.base.bfloat16()
    loss = lambda: sum((p.float() ** 2).sum() for p in model.parameters())  # noqa: E731

    def closure() -> Any:
        value: Any = loss()
        value.backward()
        return value

    opt = boosted(model)
    opt.alpha = 1e-4
    opt.zero_grad()
    opt.regularize(closure)
    opt.perturbed = [*model.base]
    opt.zero_grad()
    with pytest.warns(UserWarning, match="bfloat16"):
        opt.regularize(closure)


def test_a_buffer_of_the_module_is_moved_like_any_weight() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(2, 4, dtype=torch.float64))
            self.register_buffer("w", torch.ones(3, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ (self.w @ self.a).T)

    grads = []
    for told in (False, True):
        model = Buffered()
        base = torch.optim.SGD([model.a], lr=0.1)
        module = model if told else None
        opt = BoosterOptimizer(base, LAM, ALPHA, perturbed=[model.w], module=module)
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)

        def closure(model: Any = model, x: Tensor = x) -> Tensor:
            loss = model(x).square().sum()
            loss.backward()
            return loss

        opt.zero_grad()
        opt.regularize(closure)
        assert model.a.grad is not None
        grads.append(model.a.grad)
    assert grads[0].any()
    assert torch.equal(*grads)


def test_zeroing_in_spite_of_the_promise_is_found_beside_large_frozen_gradients() -> None:
    model = Adapted()
    for p in model.trained:
        p.data *= 1e-4  # so that the adapter's gradients are small
    opt = boosted(model, model.base, accumulates=True)

    def harmful() -> Tensor:
        opt.base_optimizer.zero_grad()
        return targets(model, 2)()

    with pytest.raises(RuntimeError, match="accumulates=True"):
        opt.regularize(harmful)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_loss_that_reaches_the_perturbed_weights_alone(accumulates: bool) -> None:
    model, stranger = Adapted(), nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([stranger], lr=0.1)
    opt = BoosterOptimizer(base, LAM, ALPHA, perturbed=model.base, accumulates=accumulates)
    with pytest.raises(RuntimeError, match="made no gradients"):
        opt.regularize(targets(model, 2))
    assert all(p.grad is None for p in model.base)


def test_weights_that_the_loss_does_not_reach() -> None:
    """One of them may be an expert that this batch leaves out; where all are, it is a mistake."""
    model, stranger = Adapted(), nn.Parameter(torch.ones(3))
    opt = boosted(model, [stranger, *model.base], self_check=False)
    opt.regularize(targets(model, 2))
    alone = [p.grad for p in model.trained]
    opt = boosted(model, model.base, self_check=False)
    opt.zero_grad()
    opt.regularize(targets(model, 2))
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip(model.trained, alone, strict=True)
        if p.grad is not None and g is not None
    )
    opt = boosted(model, [stranger, *model.base])
    for said in (1, 0):  # once
        opt.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.regularize(targets(model, 2))
        told = ["1 of the 3 weights in perturbed" in str(w.message) for w in caught]
        assert told == [True] * said
    opt = boosted(model, [stranger])
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient of any weight in perturbed"):
        opt.regularize(targets(model, 2))
    assert all(p.grad is None for p in model.parameters())
    assert stranger.grad is None
