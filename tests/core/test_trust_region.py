"""α as a trust region: halved where h falls short of its promise, else growing back."""

from __future__ import annotations

import copy
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn

from tests.optimizers import make
from tests.problems import MODELS, Problem, make_problem
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer
from torch_booster.functional import trusted
from torch_booster.hyperparameters import REGION

LAM = 2.0
TOO_LONG = 30.0  # past the valley of h


def by_hand(fraction: float, ratio: float) -> float:
    """Written out once more, with other words."""
    if ratio < 1 / 4:
        return 0.5 * fraction
    grown = fraction * 1.05
    return grown if grown < 1 else 1.0


def drop_ratio(problem: Problem, params: list[Tensor], alpha: float, norm: str) -> float:
    """(h(w) − h(w′)) over its first order, of the oracle's own w′."""
    w = [p.detach().clone().requires_grad_() for p in params]
    found = torch.autograd.grad(problem.h_of(w), w, allow_unused=True)
    g = [torch.zeros_like(p) if x is None else x for p, x in zip(w, found, strict=True)]
    lengths = [x.norm() for x in g]
    n = sum(bool(length > 0) for length in lengths)
    whole = torch.stack(lengths).norm()
    steps = [
        alpha / math.sqrt(n) / (length + 1e-7) if norm == "tensor" else alpha / (whole + 1e-7)
        for length in lengths
    ]
    moved = [p.detach() - s * x for p, s, x in zip(w, steps, g, strict=True)]
    promised = sum(s * length**2 for s, length in zip(steps, lengths, strict=True))
    return ((problem.h_of(w) - problem.h_of(moved)) / promised).item()


def wrapped(problem: Problem, alpha: float, **options: Any) -> BoosterOptimizer:
    base = make("AdamW", problem.params)
    return BoosterOptimizer(base, LAM, alpha, trust_region=True, self_check=False, **options)


def fraction(opt: BoosterOptimizer) -> float:
    (found,) = {group[REGION] for group in opt.param_groups}
    return found


@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 2**31),
    alpha=st.floats(0.01, 100.0),
    norm=st.sampled_from(["global", "tensor"]),
    usage=st.sampled_from(["one_call", "staged"]),
)
def test_each_step_is_the_formulas_with_the_alpha_that_is_left(
    name: str, seed: int, alpha: float, norm: Any, usage: str
) -> None:
    problem = make_problem(name, seed)
    opt = wrapped(problem, alpha, norm=norm)
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    base, left = make("AdamW", params), 1.0
    for _ in range(6):
        problem.take_step(opt, usage)
        ratio = drop_ratio(problem, params, left * alpha, norm)
        assume(abs(ratio - 0.25) > 1e-6)
        wanted = booster_gradient(problem.f_of, problem.h_of, params, LAM, left * alpha, norm=norm)
        for p, grad in zip(params, wanted, strict=True):
            p.grad = grad
        base.step()
        assert opt.diagnostics is not None
        assert opt.diagnostics.perturbation_norm.item() == pytest.approx(left * alpha, rel=1e-5)
        left = by_hand(left, ratio)
        assert fraction(opt) == pytest.approx(left)
        for p, q in zip(problem.params, params, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-9)


def test_where_h_falls_as_promised_nothing_changes() -> None:
    one, other = make_problem("mlp", 0), make_problem("mlp", 0)
    plain = BoosterOptimizer(make("AdamW", other.params), LAM, 0.01, self_check=False)
    opt = wrapped(one, 0.01)
    for _ in range(20):
        one.take_step(opt, "one_call")
        other.take_step(plain, "one_call")
    assert fraction(opt) == 1.0
    assert all(torch.equal(p, q) for p, q in zip(one.params, other.params, strict=True))


def test_alpha_grows_back_and_no_further() -> None:
    problem = make_problem("mlp", 0)
    opt = wrapped(problem, 0.01)
    opt.param_groups[0][REGION] = 0.5
    seen = []
    for _ in range(20):
        problem.take_step(opt, "one_call")
        seen.append(fraction(opt))
    assert seen[:2] == pytest.approx([0.525, 0.55125])
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_a_loss_that_is_no_number_promises_nothing() -> None:
    """As under a GradScaler's overflow, which skips the step."""
    assert trusted(0.5, math.nan) == 0.5
    weight = nn.Parameter(torch.ones(2))
    opt = BoosterOptimizer(torch.optim.SGD([weight], 0.1), trust_region=True, self_check=False)

    def overflows() -> Tensor:
        loss = (weight * math.inf).sum()
        loss.backward()
        return loss

    opt.regularize(overflows)
    assert fraction(opt) == 1.0


def test_a_step_into_where_there_is_no_loss_is_too_long() -> None:
    weight = nn.Parameter(torch.ones(()))
    opt = BoosterOptimizer(torch.optim.SGD([weight], 0.1), 1.0, 3.0, trust_region=True)

    def root() -> Tensor:
        loss = weight.sqrt()
        loss.backward()
        return loss

    opt.regularize(root)  # of a negative number, at w′
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbed_harmful_loss.isnan()
    assert fraction(opt) == 0.5


@pytest.mark.parametrize("told", [True, False])
def test_the_scale_of_a_gradscaler_has_to_be_told(told: bool) -> None:
    problem = make_problem("mlp", 0)
    opt = wrapped(problem, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled(loss: Tensor) -> Tensor:
        scaler.scale(loss).backward()
        return loss

    def run() -> None:
        for _ in range(12):
            opt.zero_grad()
            scale = {"loss_scale": scaler.get_scale()} if told else {}
            opt.regularize(lambda: scaled(problem.h()), **scale)
            scaled(problem.f())
            scaler.step(opt)
            scaler.update()

    if told:
        run()
        assert fraction(opt) == 1.0
    else:
        with pytest.warns(UserWarning, match=r"to a thousandth.*loss_scale=scaler\.get_scale"):
            run()
        assert fraction(opt) == 2.0**-10


def test_a_scale_of_zero_is_refused() -> None:
    problem = make_problem("mlp", 0)
    with pytest.raises(ValueError, match="loss_scale is 0"):
        wrapped(problem, 0.01).regularize(problem.h_closure, loss_scale=0.0)


@pytest.mark.parametrize("every", [1, 3])
def test_only_steps_with_a_regulariser_count(every: int) -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG, every=every)
    seen = []
    for _ in range(3):
        problem.take_step(opt, "one_call")
        seen.append(fraction(opt))
    assert seen[0] == 0.5
    assert len(set(seen)) == (1 if every == 3 else 3)


def test_what_is_left_of_alpha_is_saved_and_loaded() -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG)
    for _ in range(3):
        problem.take_step(opt, "one_call")
    assert fraction(opt) < 1
    other = copy.deepcopy(problem.params), make_problem("mlp", 1)
    for p, q in zip(other[1].params, other[0], strict=True):
        p.data.copy_(q.data)
    resumed = wrapped(other[1], TOO_LONG)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        problem.take_step(opt, "one_call")
        other[1].take_step(resumed, "one_call")
    assert fraction(resumed) == fraction(opt)
    assert all(torch.equal(p, q) for p, q in zip(problem.params, other[1].params, strict=True))


def test_a_state_of_the_bare_optimizer_leaves_what_is_in_force() -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG)
    bare = make("AdamW", make_problem("mlp", 1).params).state_dict()
    problem.take_step(opt, "one_call")
    opt.load_state_dict(bare)
    assert fraction(opt) == 0.5


def test_a_state_of_booster_without_it_brings_the_whole_alpha() -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG)
    other = make_problem("mlp", 1)
    plain = BoosterOptimizer(make("AdamW", other.params), LAM, TOO_LONG, self_check=False)
    other.take_step(plain, "one_call")
    problem.take_step(opt, "one_call")
    opt.load_state_dict(plain.state_dict())
    assert opt.is_due()
    assert fraction(opt) == 1.0


def test_a_state_without_a_trust_region_has_no_trace_of_it() -> None:
    problem = make_problem("mlp", 1)
    opt = BoosterOptimizer(make("AdamW", problem.params), LAM, TOO_LONG, self_check=False)
    problem.take_step(opt, "one_call")
    assert all(REGION not in group for group in opt.state_dict()["param_groups"])
    opt.trust_region = True  # a run may take it up
    problem.take_step(opt, "one_call")
    assert fraction(opt) == 0.5


def test_switched_off_the_whole_alpha_is_in_force() -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG)
    problem.take_step(opt, "one_call")
    opt.trust_region = False
    problem.take_step(opt, "one_call")
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(TOO_LONG)
    assert fraction(opt) == 0.5


def test_the_users_alpha_stays_the_users() -> None:
    """A scheduler of α, or a group with its own, is shortened in proportion."""
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG)
    problem.take_step(opt, "one_call")
    assert opt.alpha == TOO_LONG
    opt.alpha = 1.0
    problem.take_step(opt, "one_call")
    assert opt.diagnostics is not None
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(0.5)


def test_a_group_that_comes_late_joins_the_others() -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, TOO_LONG)
    problem.take_step(opt, "one_call")
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    assert fraction(opt) == 0.5


def test_frozen_weights_take_the_same_share() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    base = torch.optim.SGD(model[1].parameters(), lr=0.1)
    opt = BoosterOptimizer(base, LAM, TOO_LONG, perturbed=model[0].parameters(), trust_region=True)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    lengths = []
    for _ in range(2):
        opt.zero_grad()
        opt.regularize(closure)
        assert opt.diagnostics is not None
        lengths.append(opt.diagnostics.perturbation_norm.item())
        closure()
        opt.step()
    assert lengths == pytest.approx([TOO_LONG, TOO_LONG / 2])


def test_a_check_changes_nothing() -> None:
    problem = make_problem("mlp", 1)
    opt = BoosterOptimizer(make("AdamW", problem.params), LAM, TOO_LONG)
    opt.trust_region = True
    opt.check(problem.h_closure)
    assert fraction(opt) == 1.0


@pytest.mark.parametrize("share", [0.0, -1.0, 2.0, math.nan])
def test_no_other_share_than_a_part_of_alpha_is_taken(share: float) -> None:
    problem = make_problem("mlp", 1)
    opt = wrapped(problem, 0.1)
    group = {"params": [nn.Parameter(torch.ones(2))], REGION: share}
    with pytest.raises(ValueError, match=REGION):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    opt.param_groups[0][REGION] = share
    with pytest.raises(ValueError, match=REGION):
        opt.regularize(problem.h_closure)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_anything_but_true_and_false_is_refused(value: Any) -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match="trust_region must be True or False"):
        BoosterOptimizer(base, trust_region=value)
    opt = BoosterOptimizer(base)
    with pytest.raises(TypeError, match="trust_region must be True or False"):
        opt.trust_region = value
    assert opt.trust_region is False
