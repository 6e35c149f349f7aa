"""λ over time: k·λ·min(1, t/T) at the steps that k divides, whoever takes them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.optimizers import WRAPPABLE, accepted, make
from tests.problems import Problem, make_problem
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer

LAM, ALPHA = 4.0, 0.1


def by_hand(step: int, lam: float, warmup: int, every: int, delay: int = 0) -> float:
    if step % every != 0 or step < delay:
        return 0.0
    return every * lam * (1.0 if step - delay >= warmup else (step - delay) / warmup)


def oracle(problem: Problem, warmup: int, every: int, steps: int) -> list[Tensor]:
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    base = make("AdamW", params)
    for t in range(steps):
        lam = by_hand(t, LAM, warmup, every)
        grads = booster_gradient(problem.f_of, problem.h_of, params, lam, ALPHA)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        base.step()
    return params


def scheduled(problem: Problem, warmup: int, every: int, lam: float = LAM) -> BoosterOptimizer:
    base = make("AdamW", problem.params)
    return BoosterOptimizer(base, lam, ALPHA, lam_warmup_steps=warmup, every=every)


def one_call(opt: BoosterOptimizer, problem: Problem) -> None:
    opt.zero_grad()
    opt.step(problem.f_closure, problem.h_closure)


def staged(opt: BoosterOptimizer, problem: Problem) -> None:
    opt.zero_grad()
    due = opt.is_due()
    assert (opt.regularize(problem.h_closure) is not None) == due
    for _ in range(2):
        (problem.f() / 2).backward()
    opt.step()


USAGES: dict[str, Callable[[BoosterOptimizer, Problem], None]] = {
    "one_call": one_call,
    "staged": staged,
}


def assert_close(params: list[Tensor], expected: list[Tensor]) -> None:
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize(("warmup", "every"), [(0, 1), (5, 1), (0, 3), (4, 3), (100, 2)])
def test_trajectory_equals_the_oracle(warmup: int, every: int, usage: str) -> None:
    problem = make_problem()
    expected = oracle(problem, warmup, every, 8)
    opt = scheduled(problem, warmup, every)
    for t in range(8):
        assert opt.step_count == t
        USAGES[usage](opt, problem)
        assert (opt.diagnostics is not None) == (by_hand(t, LAM, warmup, every) > 0)
    assert_close(problem.params, expected)


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("saved_by", ["booster", "bare"])
def test_a_resumed_run_goes_on_where_the_unbroken_one_was(usage: str, saved_by: str) -> None:
    problem = make_problem()
    expected = oracle(problem, 6, 2, 8)
    opt = scheduled(problem, 6, 2)
    for _ in range(3):
        USAGES[usage](opt, problem)
    file = io.BytesIO()
    torch.save((opt if saved_by == "booster" else opt.base_optimizer).state_dict(), file)
    file.seek(0)
    resumed = scheduled(problem, 6, 2, lam=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.step_count, resumed.lam) == (3, LAM)
    for _ in range(5):
        USAGES[usage](resumed, problem)
    assert_close(problem.params, expected)


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize(("warmup", "every"), [(0, 1), (4, 1), (3, 2)])
def test_a_delay_before_the_warm_up(warmup: int, every: int, usage: str) -> None:
    problem = make_problem()
    base = make("AdamW", problem.params)
    opt = BoosterOptimizer(
        base, LAM, ALPHA, lam_warmup_steps=warmup, lam_delay_steps=3, every=every
    )
    for t in range(9):
        lam = by_hand(t, LAM, warmup, every, delay=3)
        assert opt._lam(opt.param_groups[0]) == pytest.approx(lam)
        assert opt.is_due() == (lam > 0)
        USAGES[usage](opt, problem)


def test_copies_count_on() -> None:
    problem = make_problem()
    opt = scheduled(problem, 6, 1)
    one_call(opt, problem)
    for copied in (copy.deepcopy(opt),):
        params = [p for group in copied.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.ones_like(p)
        copied.lam = 0.0
        copied.step()
        assert (copied.step_count, opt.step_count) == (2, 1)


def test_steps_of_the_base_count_and_a_dropped_wrapper_does_not() -> None:
    problem = make_problem()
    base = make("AdamW", problem.params)
    opt = BoosterOptimizer(base, LAM, ALPHA)
    del opt
    opt = BoosterOptimizer(base, LAM, ALPHA)
    opt.zero_grad()
    opt.regularize(problem.h_closure)
    problem.f_closure()
    base.step()
    assert opt.step_count == 1
    assert opt.diagnostics is not None


def test_a_step_that_a_grad_scaler_skips_does_not_count() -> None:
    problem = make_problem(dtype=torch.float32)
    opt = scheduled(problem, 4, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for t in range(4):
        opt.zero_grad()

        def harmful() -> Tensor:
            loss = problem.h()
            scaler.scale(loss).backward()
            return loss

        opt.regularize(harmful)
        loss = problem.f() * (float("inf") if t == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.step_count == 3


def test_lam_zero_counts_all_the_same() -> None:
    problem = make_problem()
    opt = scheduled(problem, 4, 1, lam=0.0)
    for _ in range(3):
        one_call(opt, problem)
    opt.lam = LAM
    assert opt.step_count == 3
    assert opt._lam(opt.param_groups[0]) == pytest.approx(LAM * 3 / 4)


def test_a_groups_own_lam_is_scheduled_too() -> None:
    problem = make_problem()
    inner, outer = problem.params[:2], problem.params[2:]
    base = torch.optim.SGD([{"params": inner, "booster_lam": 2.0}, {"params": outer}], lr=0.1)
    opt = BoosterOptimizer(base, LAM, ALPHA, lam_warmup_steps=4)
    for t in range(6):
        share = min(1.0, t / 4)
        lams = [2.0 * share] * len(inner) + [LAM * share] * len(outer)
        wanted = booster_gradient(problem.f_of, problem.h_of, problem.params, lams, ALPHA)
        opt.zero_grad()
        opt.regularize(problem.h_closure)
        problem.f_closure()
        for p, grad in zip(problem.params, wanted, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)
        opt.step()


def test_a_group_that_comes_late_counts_with_the_others() -> None:
    problem = make_problem()
    opt = scheduled(problem, 4, 1)
    one_call(opt, problem)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert [group["booster_step"] for group in opt.param_groups] == [1, 1]


@pytest.mark.parametrize("name", WRAPPABLE)
def test_every_base_counts(name: str) -> None:
    problem = make_problem()
    params = accepted(name, problem.params)
    opt = BoosterOptimizer(make(name, params), LAM, ALPHA, module=problem.model)
    for t in range(3):
        assert opt.step_count == t
        one_call(opt, problem)
    assert opt.step_count == 3


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("lam_warmup_steps", -1, "lam_warmup_steps is -1. Pass at least 0"),
        ("lam_warmup_steps", 2.5, "whole number, got 2.5"),
        ("lam_delay_steps", -1, "lam_delay_steps is -1. Pass at least 0"),
        ("every", 0, "every is 0. Pass at least 1"),
        ("every", True, "whole number, got True"),
        ("norm", "Tensor", 'norm is \'Tensor\'. Pass "global" or "tensor"'),
    ],
)
def test_bad_schedules(argument: str, value: object, match: str) -> None:
    base = make("AdamW", make_problem().params)
    with pytest.raises((TypeError, ValueError), match=match):
        BoosterOptimizer(base, **{argument: value})  # type: ignore[arg-type]
    assert "booster_lam" not in base.param_groups[0]
    optimizer = BoosterOptimizer(base)
    before = getattr(optimizer, argument)
    with pytest.raises((TypeError, ValueError), match=match):
        setattr(optimizer, argument, value)
    assert getattr(optimizer, argument) == before
