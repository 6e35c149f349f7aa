"""A norm for each tensor: w′ᵢ = wᵢ − (α/√n)·gᵢ/(‖gᵢ‖ + ε) over n tensors with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.optimizers import make
from tests.problems import MODELS, make_problem
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer
from torch_booster.distributed import tensor_norms
from torch_booster.functional import perturb_, step_sizes

shapes = st.lists(
    st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6
)
alphas = st.floats(1e-3, 10.0)
seeds = st.integers(0, 2**31)


def tensor_wise(params: Sequence[Tensor], lam: float = 1.0, alpha: float = 0.1) -> BoosterOptimizer:
    base = torch.optim.SGD(params, lr=0.1)
    return BoosterOptimizer(base, lam, alpha, norm="tensor", eps=0.0, self_check=False)


def moves(
    opt: BoosterOptimizer, params: Sequence[Tensor], loss: Callable[[], Tensor]
) -> list[Tensor]:
    """w′ − w of each parameter, as the second pass finds it."""
    seen: list[list[Tensor]] = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in params])
        value = loss()
        value.backward()
        return value

    opt.zero_grad()
    opt.regularize(closure)
    return [b - a for a, b in zip(*seen, strict=True)]


def parameters(sizes: list[tuple[int, ...]], seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for size in sizes
    ]


def valley(params: Sequence[Tensor], scales: Sequence[float]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        terms = [c * (p - 3).square().sum() for p, c in zip(params, scales, strict=True)]
        return torch.stack(terms).sum()

    return loss


@given(sizes=shapes, seed=seeds, alpha=alphas)
def test_each_tensor_moves_by_the_same_length(
    sizes: list[tuple[int, ...]], seed: int, alpha: float
) -> None:
    params = parameters(sizes, seed)
    opt = tensor_wise(params, alpha=alpha)
    moved = moves(opt, params, valley(params, [10.0**i for i in range(len(params))]))
    for move in moved:
        assert move.norm().item() == pytest.approx(alpha / len(params) ** 0.5, rel=1e-6)
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(alpha, rel=1e-9)


@given(sizes=shapes, seed=seeds, factor=st.floats(1e-3, 1e3), which=st.integers(0, 5))
def test_the_scale_of_one_tensors_gradient_does_not_matter(
    sizes: list[tuple[int, ...]], seed: int, factor: float, which: int
) -> None:
    params = parameters(sizes, seed)
    assume(which < len(params))
    scales = [1.0] * len(params)
    before = moves(tensor_wise(params), params, valley(params, scales))
    scales[which] = factor
    after = moves(tensor_wise(params), params, valley(params, scales))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@given(size=st.integers(1, 9), seed=seeds, alpha=alphas)
def test_one_tensor_is_the_global_rule(size: int, seed: int, alpha: float) -> None:
    (param,) = parameters([(size,)], seed)
    (one,) = moves(tensor_wise([param], alpha=alpha), [param], valley([param], [1.0]))
    base = torch.optim.SGD([param], lr=0.1)
    opt = BoosterOptimizer(base, 1.0, alpha, eps=0.0, self_check=False)
    (other,) = moves(opt, [param], valley([param], [1.0]))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_tensors_without_a_gradient_take_no_share() -> None:
    """Zero gradients, frozen and unreached tensors: the length stays α."""
    params = parameters([(3,), (2, 2), (4,), (2,)], 0)
    params[3].requires_grad_(False)
    opt = tensor_wise(params, alpha=0.5)
    live, still = params[0], params[1]
    moved = moves(opt, params, lambda: live.square().sum() + (still * 0).sum())
    assert moved[0].norm().item() == pytest.approx(0.5)
    assert not any(move.any() for move in moved[1:])


def test_no_gradient_at_all() -> None:
    params = parameters([(3,), (2,)], 0)
    opt = tensor_wise(params)
    moved = moves(opt, params, lambda: sum((p * 0).sum() for p in params))  # type: ignore[arg-type,return-value]
    assert not any(move.any() for move in moved)
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in params)


def test_shared_scalar_and_complex_tensors() -> None:
    scalar = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    z = nn.Parameter(torch.tensor([3.0 + 4.0j], dtype=torch.complex128))
    shared = nn.Linear(3, 3, bias=False).double()
    twice = nn.Sequential(shared, shared)
    params = [scalar, z, *twice.parameters()]
    x = torch.randn(2, 3, dtype=torch.float64)
    opt = tensor_wise(params, alpha=0.3)
    moved = moves(
        opt, params, lambda: scalar.square() + z.abs().square().sum() + twice(x).square().sum()
    )
    assert len(moved) == 3
    for move in moved:
        assert torch.linalg.vector_norm(move).item() == pytest.approx(0.3 / 3**0.5)


@pytest.mark.parametrize("usage", ["one_call", "staged", "accumulates"])
@pytest.mark.parametrize("model", MODELS)
def test_trajectory_equals_the_oracle(model: str, usage: str) -> None:
    problem = make_problem(model)
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    base = make("AdamW", params)
    opt = BoosterOptimizer(
        make("AdamW", problem.params), 5.0, 0.1, norm="tensor", accumulates=usage == "accumulates"
    )
    for _ in range(6):
        grads = booster_gradient(problem.f_of, problem.h_of, params, 5.0, 0.1, norm="tensor")
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        base.step()
        problem.take_step(opt, usage)
    for p, q in zip(problem.params, params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["global", "tensor"])
def test_groups_with_alphas_of_their_own(norm: str) -> None:
    problem = make_problem()
    inner, outer = problem.params[:2], problem.params[2:]
    each = [0.3] * len(inner) + [0.05] * len(outer)
    expected = booster_gradient(problem.f_of, problem.h_of, problem.params, 2.0, each, norm=norm)
    groups = [{"params": inner, "booster_alpha": 0.3}, {"params": outer}]
    opt = BoosterOptimizer(torch.optim.SGD(groups, lr=0.1), 2.0, 0.05, norm=norm)  # type: ignore[arg-type]
    opt.regularize(problem.h_closure)
    problem.f_closure()
    for p, grad in zip(problem.params, expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_measured_after_rounding(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.randn(64).to(dtype)) for _ in range(2)]
    opt = tensor_wise(params, alpha=1.0)
    moved = moves(opt, params, lambda: sum(p.float().square().sum() for p in params))  # type: ignore[arg-type,return-value]
    length = torch.cat([m.float() for m in moved]).norm().item()
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(length, rel=1e-3)
    assert length == pytest.approx(1.0, rel=0.05)


def test_the_first_order_drop_is_that_of_the_norm_in_use() -> None:
    params = parameters([(3,), (2,)], 1)
    slopes = [torch.ones_like(params[0]), torch.full_like(params[1], 5.0)]
    opt = tensor_wise(params, alpha=0.2)
    moves(opt, params, lambda: sum((p * s).sum() for p, s in zip(params, slopes, strict=True)))  # type: ignore[arg-type,return-value]
    read = opt.read_diagnostics()
    expected = 0.2 / 2**0.5 * sum(s.norm().item() for s in slopes)
    assert read["harmful_loss_drop"] == pytest.approx(expected)
    assert read["drop_ratio"] == pytest.approx(1.0)


def test_norms_of_tensors_in_the_widest_dtype() -> None:
    lengths = [torch.tensor(3.0), None, torch.tensor(4.0, dtype=torch.float64)]
    found = tensor_norms(lengths, [torch.ones(1)] * 3)
    assert found.dtype is torch.float64
    assert found.tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize("norm", ["Tensor", "", None, 2])
def test_another_norm_is_refused(norm: object) -> None:
    base = torch.optim.SGD(parameters([(2,)], 0), lr=0.1)
    with pytest.raises(ValueError, match='Pass "global" or "tensor"'):
        BoosterOptimizer(base, norm=norm)  # type: ignore[arg-type]
    assert "booster_lam" not in base.param_groups[0]


class Moves(TorchFunctionMode):
    """Notes to where tensors are moved, and whether without waiting."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, bool]] = set()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device):
            self.seen.add((args[1].type, bool(kwargs.get("non_blocking"))))
        return func(*args, **kwargs)


def test_what_the_cpu_reads_has_arrived() -> None:
    """A copy from an accelerator that is not waited for holds garbage at first."""
    with Moves() as moves:
        for device in ("cpu", "meta"):
            lengths = tensor_norms([torch.ones((), device=device)] * 2, [torch.ones(1)] * 2)
            weights = [torch.ones(3, device=device) for _ in range(2)]
            sizes = step_sizes(lengths, [0.1, 0.1], "global", 1e-7)
            perturb_(weights, [w.clone() for w in weights], [w.clone() for w in weights], sizes)
    assert moves.seen == {("cpu", False), ("meta", True)}
