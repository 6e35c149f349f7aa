"""The Booster step against the oracle: base optimizer x model x usage x what closures do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.optimizers import WRAPPABLE, accepted, make
from tests.problems import MODELS, Problem, make_problem
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer

STEPS = 8

Zeroing = Callable[[BoosterOptimizer, Problem], None]
ZEROING: dict[str, Zeroing] = {
    "accumulate": lambda opt, problem: None,
    "opt": lambda opt, problem: opt.zero_grad(),
    "opt_in_place": lambda opt, problem: opt.zero_grad(set_to_none=False),
    "base": lambda opt, problem: opt.base_optimizer.zero_grad(),
    "base_in_place": lambda opt, problem: opt.base_optimizer.zero_grad(set_to_none=False),
    "model": lambda opt, problem: problem.model.zero_grad(),
    "model_in_place": lambda opt, problem: problem.model.zero_grad(set_to_none=False),
    "by_hand_in_place": lambda opt, problem: _zero_by_hand(problem),
}


def _zero_by_hand(problem: Problem) -> None:
    with torch.no_grad():
        for p in problem.params:
            if p.grad is not None:
                p.grad.zero_()


def closures(
    opt: BoosterOptimizer, problem: Problem, zeroing: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    def alignment_closure() -> Tensor:
        ZEROING[zeroing](opt, problem)
        return problem.f_closure()

    def harmful_closure() -> Tensor:
        ZEROING[zeroing](opt, problem)
        return problem.h_closure()

    return alignment_closure, harmful_closure


def one_call(opt: BoosterOptimizer, problem: Problem, zeroing: str) -> None:
    if zeroing == "accumulate":
        opt.zero_grad()
    opt.step(*closures(opt, problem, zeroing))


def staged(opt: BoosterOptimizer, problem: Problem, zeroing: str) -> None:
    opt.zero_grad()
    opt.regularize(closures(opt, problem, zeroing)[1])
    problem.f_closure()
    opt.step()


USAGES = {"one_call": one_call, "staged": staged}


def restrict(problem: Problem, name: str) -> None:
    """Freezes what the optimizer cannot take, in the model and in the oracle alike."""
    taken = accepted(name, problem.params)
    if len(taken) == len(problem.params):
        return
    position = [i for i, p in enumerate(problem.params) if any(p is t for t in taken)]
    everything = list(problem.params)
    for p in everything:
        p.requires_grad_(any(p is t for t in taken))

    def fill(values: list[Tensor]) -> list[Tensor]:
        filled = [p.detach() for p in everything]
        for i, value in zip(position, values, strict=True):
            filled[i] = value
        return filled

    f_of, h_of = problem.f_of, problem.h_of
    problem.f_of = lambda values: f_of(fill(list(values)))
    problem.h_of = lambda values: h_of(fill(list(values)))
    problem.params = taken


def oracle_run(problem: Problem, name: str, lam: float, alpha: float, steps: int) -> list[Tensor]:
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    base = make(name, params)
    for _ in range(steps):
        grads = booster_gradient(problem.f_of, problem.h_of, params, lam, alpha)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        base.step()
    return params


def assert_close(params: list[Tensor], expected: list[Tensor], atol: float = 1e-12) -> None:
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WRAPPABLE)
def test_trajectory_equals_the_oracle(name: str, model: str, usage: str) -> None:
    problem = make_problem(model)
    restrict(problem, name)
    # Muon orthogonalises in bfloat16, which turns a last-bit difference into a visible one.
    atol = 1e-12 if name != "Muon" else 1e-3
    expected = oracle_run(problem, name, lam=5.0, alpha=0.1, steps=STEPS)
    opt = BoosterOptimizer(make(name, problem.params), lam=5.0, alpha=0.1)
    for _ in range(STEPS):
        USAGES[usage](opt, problem, "accumulate")
    assert_close(problem.params, expected, atol)


@pytest.mark.parametrize("zeroing", ZEROING)
@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("model", MODELS)
def test_whatever_closures_do_to_grad(model: str, usage: str, zeroing: str) -> None:
    problem = make_problem(model)
    expected = oracle_run(problem, "AdamW", lam=3.0, alpha=0.2, steps=STEPS)
    opt = BoosterOptimizer(make("AdamW", problem.params), lam=3.0, alpha=0.2)
    for _ in range(STEPS):
        USAGES[usage](opt, problem, zeroing)
    assert_close(problem.params, expected)


@pytest.mark.parametrize("usage", USAGES)
def test_micro_batches(usage: str) -> None:
    """A closure may loop: three backward passes on thirds equal one on the sum."""
    problem = make_problem()
    expected = oracle_run(problem, "SGD", lam=5.0, alpha=0.1, steps=STEPS)

    def in_thirds(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for _ in range(3):
                third = loss() / 3
                third.backward()
                total += third.detach()
            return total

        return closure

    problem.f_closure, problem.h_closure = in_thirds(problem.f), in_thirds(problem.h)  # type: ignore[method-assign]
    opt = BoosterOptimizer(make("SGD", problem.params), 5.0, 0.1)
    for _ in range(STEPS):
        USAGES[usage](opt, problem, "accumulate")
    assert_close(problem.params, expected)


@pytest.mark.parametrize("zeroes", [False, True])
def test_regularize_keeps_gradients_that_were_there(zeroes: bool) -> None:
    problem = make_problem()
    opt = BoosterOptimizer(make("SGD", problem.params), 5.0, 0.1)
    before = [torch.randn_like(p) for p in problem.params]
    for p, grad in zip(problem.params, before, strict=True):
        p.grad = grad.clone()
    opt.regularize(closures(opt, problem, "opt" if zeroes else "accumulate")[1])

    def nothing(params: list[Tensor]) -> Tensor:
        return sum((p * 0).sum() for p in params)  # type: ignore[return-value]

    expected = booster_gradient(nothing, problem.h_of, problem.params, 5.0, 0.1)
    for p, kept, regularizer in zip(problem.params, before, expected, strict=True):
        torch.testing.assert_close(p.grad, kept + regularizer, rtol=0, atol=1e-12)


def test_one_call_keeps_gradients_unless_a_closure_zeroes_them() -> None:
    problem = make_problem()
    extra = [torch.randn_like(p) for p in problem.params]
    grads = booster_gradient(problem.f_of, problem.h_of, problem.params, 5.0, 0.1)
    for zeroing in ("accumulate", "opt", "model_in_place"):
        opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.0), 5.0, 0.1)
        for p, grad in zip(problem.params, extra, strict=True):
            p.grad = grad.clone()
        opt.step(*closures(opt, problem, zeroing))
        for p, grad, e in zip(problem.params, grads, extra, strict=True):
            if grad is not None:
                kept = e if zeroing == "accumulate" else 0.0
                torch.testing.assert_close(p.grad, grad + kept, rtol=0, atol=1e-12)


def test_clipping_inside_the_harmful_closure_acts_on_each_harmful_gradient() -> None:
    """An edit of .grad is not an accumulation: it must see ∇h alone, in both passes."""
    problem = make_problem()
    reached = problem.params[:4]
    seen: list[Tensor] = []

    def recording() -> Tensor:
        loss = problem.h_closure()
        nn.utils.clip_grad_norm_(problem.params, 1e-3)
        seen.append(torch.cat([p.grad.flatten() for p in reached if p.grad is not None]))
        return loss

    opt = BoosterOptimizer(make("SGD", problem.params), 5.0, 0.1, self_check=False)
    opt.regularize(recording)
    got = torch.cat([p.grad.flatten() for p in reached if p.grad is not None])
    torch.testing.assert_close(got, 5.0 * (seen[0] - seen[1]), rtol=0, atol=1e-15)
    torch.testing.assert_close(seen[1].norm().item(), 1e-3, rtol=1e-4, atol=0)


def test_per_group_hyperparameters_share_one_norm() -> None:
    problem = make_problem()
    inner, outer = problem.params[:2], problem.params[2:]
    lams = [2.0] * len(inner) + [0.0] * len(outer)
    alphas = [0.3] * len(inner) + [0.05] * len(outer)
    expected = booster_gradient(problem.f_of, problem.h_of, problem.params, lams, alphas)
    base = torch.optim.SGD(
        [
            {"params": inner, "booster_lam": 2.0, "booster_alpha": 0.3},
            {"params": []},
            {"params": outer, "booster_lam": 0.0},
        ],
        lr=0.1,
    )
    opt = BoosterOptimizer(base, lam=7.0, alpha=0.05)
    opt.regularize(problem.h_closure)
    problem.f_closure()
    for p, grad in zip(problem.params, expected, strict=True):
        if grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)


def test_a_group_whose_lam_is_zero_gets_no_gradient() -> None:
    """Not even zeros: AdamW would let the weights decay for them."""
    problem = make_problem()
    inner, outer = problem.params[:2], problem.params[2:]
    groups = [{"params": inner}, {"params": outer, "booster_lam": 0.0}]
    BoosterOptimizer(torch.optim.AdamW(groups)).regularize(problem.h_closure)
    assert all(p.grad is not None for p in inner)
    assert all(p.grad is None for p in outer)


def test_hyperparameters_can_change_during_training() -> None:
    problem = make_problem()
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    base = make("SGD", params)
    opt = BoosterOptimizer(make("SGD", problem.params), 5.0, 0.1)
    for step in range(4):
        opt.lam, opt.alpha = float(step), 0.1 * step
        grads = booster_gradient(problem.f_of, problem.h_of, params, opt.lam, opt.alpha)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        base.step()
        one_call(opt, problem, "accumulate")
    assert_close(problem.params, params)


def test_parameters_that_no_loss_reaches_keep_no_gradient() -> None:
    problem = make_problem()
    assert isinstance(problem.model.unused, nn.Linear)
    before = copy.deepcopy(problem.model.unused.state_dict())
    opt = BoosterOptimizer(torch.optim.AdamW(problem.model.parameters(), weight_decay=0.5))
    one_call(opt, problem, "accumulate")
    assert problem.model.unused.weight.grad is None
    assert problem.model.frozen.grad is None  # type: ignore[union-attr]
    for name, value in problem.model.unused.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_expert_reached_only_at_the_perturbed_weights() -> None:
    """Routing may change under the perturbation; the missing gradient then counts as zero."""
    a = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    b = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    for zeroes in (False, True):
        opt = BoosterOptimizer(torch.optim.SGD([a, b], lr=0.1), lam=3.0, alpha=0.5)
        opt.zero_grad()

        def closure(opt: BoosterOptimizer = opt, zeroes: bool = zeroes) -> Tensor:
            if zeroes:
                opt.zero_grad()
            loss = (a * 4.0).sum() if a.item() > 0.9 else (b * 2.0).sum()
            loss.backward()
            return loss

        opt.regularize(closure)
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.item() == pytest.approx(3.0 * 4.0)
        assert b.grad.item() == pytest.approx(3.0 * -2.0)


def test_step_returns_what_the_alignment_closure_returned() -> None:
    problem = make_problem()
    opt = BoosterOptimizer(make("AdamW", problem.params))
    before = problem.f().item()
    loss = opt.step(problem.f_closure, problem.h_closure)
    assert loss.item() == before
    loss = opt.step(closure=lambda: problem.f_closure().item(), harmful_closure=problem.h_closure)
    assert isinstance(loss, float)


def test_diagnostics() -> None:
    problem = make_problem()
    opt = BoosterOptimizer(make("SGD", problem.params), 5.0, 0.1)
    assert opt.diagnostics is None
    grads = torch.autograd.grad(problem.h(), problem.params, allow_unused=True)
    norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
    before = problem.h().detach()
    harmful_loss = opt.regularize(problem.h_closure)
    with torch.no_grad():
        for p, g in zip(problem.params, grads, strict=True):
            if g is not None:
                p.sub_(0.1 * g / (norm + 1e-7))
        after = problem.h()
    seen = opt.diagnostics
    assert seen is not None
    assert torch.equal(seen.harmful_loss, before)
    assert harmful_loss is seen.harmful_loss
    torch.testing.assert_close(seen.perturbed_harmful_loss, after)
    torch.testing.assert_close(seen.harmful_loss_drop, before - after)
    torch.testing.assert_close(seen.harmful_grad_norm, norm)
    torch.testing.assert_close(seen.perturbation_norm.item(), 0.1, rtol=1e-6, atol=0)
    assert all(not value.requires_grad and value.ndim == 0 for value in seen)
