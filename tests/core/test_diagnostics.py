"""What reads the diagnostics is warned, once, when an alignment goes wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.problems import make_problem
from torch_booster import BoosterOptimizer, Diagnostics
from torch_booster.diagnostics import alarms, smoothed

HEALTHY = {"harmful_loss": 2.3, "drop_ratio": 0.95}


@pytest.mark.parametrize(
    ("step", "changes", "start", "kinds"),
    [
        (700, {}, 1.5, []),
        (700, {"drop_ratio": 1.1}, 1.5, []),
        (700, {"drop_ratio": 1e-3}, 1.5, []),  # as of gradients that a GradScaler has scaled
        (700, {"drop_ratio": -0.4}, 1.5, ["blow-up"]),
        (0, {"drop_ratio": -0.4}, math.nan, ["blow-up"]),
        (10, {"harmful_loss": 1.5}, 1.5, []),
        (50, {"harmful_loss": 1.6}, 1.5, ["easy way out"]),
        (50, {"harmful_loss": 1.7}, 1.5, []),
        (700, {"harmful_loss": 1.4}, math.nan, []),
        (700, {"harmful_loss": 1.4, "drop_ratio": -9.0}, 1.5, ["blow-up", "easy way out"]),
    ],
)
def test_alarms(step: int, changes: dict[str, float], start: float, kinds: list[str]) -> None:
    values = HEALTHY | changes
    found = alarms(step, values["drop_ratio"], values["harmful_loss"], start)
    assert list(found) == kinds
    for text in found.values():
        assert f"At step {step} " in text
        assert "lam" in text.split(". ")[-1]  # the remedy


def overshot() -> tuple[BoosterOptimizer, Callable[[], Tensor]]:
    """A step that is far too long for the valley."""
    param = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.0), 1.0, 100.0)

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    return opt, closure


def test_read_diagnostics_warns_once_with_step_value_and_remedy() -> None:
    opt, closure = overshot()
    for step in range(8):
        opt.zero_grad()
        opt.step(closure, closure)
        if step < 2:
            opt.read_diagnostics()
    with pytest.warns(UserWarning, match=r"At step 8 .* -0.\d+ times .*lower alpha or lam"):
        read = opt.read_diagnostics()
    assert read["drop_ratio"] == pytest.approx(-49.0, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opt.read_diagnostics() == read


def test_single_steps_below_zero_are_no_alarm() -> None:
    mean = None
    for value in (0.9, 0.95, -76.0, 0.9, 0.9, math.nan, -3.0):
        mean = smoothed(mean, torch.tensor(value))
        assert mean.item() > 0
    for _ in range(20):
        mean = smoothed(mean, torch.tensor(-0.5))
    assert mean.item() < 0


def test_the_harmful_loss_at_its_start_is_told_after_a_while() -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.0), 1.0, 0.01)
    for step in range(60):
        opt.step(problem.f_closure, problem.h_closure)
        if step < 49:
            opt.read_diagnostics()
    with pytest.warns(UserWarning, match=r"At step 60 the harmful loss is .*lam_warmup_steps"):
        opt.read_diagnostics()


@pytest.mark.parametrize("why", ["resumed", "late"])
def test_a_start_that_was_not_seen_is_no_reason(why: str) -> None:
    problem = make_problem()
    base = torch.optim.SGD(problem.params, lr=0.0)
    opt = BoosterOptimizer(base, 0.0, 0.01)
    for _ in range(60):
        opt.step(problem.f_closure, problem.h_closure)
    opt.lam = 1.0
    if why == "resumed":
        state = opt.state_dict()
        opt = BoosterOptimizer(base, 1.0, 0.01)
        opt.load_state_dict(state)
        opt.lam = 1.0
    opt.step(problem.f_closure, problem.h_closure)
    assert opt.read_diagnostics()["harmful_loss"] > 0


def test_numbers_are_those_of_the_tensors() -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1), 5.0, 0.1)
    assert opt.read_diagnostics() == {}
    opt.step(problem.f_closure, problem.h_closure)
    assert opt.diagnostics is not None
    assert opt.read_diagnostics() == {n: x.item() for n, x in opt.diagnostics._asdict().items()}
    assert tuple(opt.read_diagnostics()) == Diagnostics._fields


def test_the_ratio_is_one_where_the_step_is_short() -> None:
    problem = make_problem()
    opt = BoosterOptimizer(torch.optim.SGD(problem.params, lr=0.1), 5.0, 1e-5)
    opt.regularize(problem.h_closure)
    assert opt.read_diagnostics()["drop_ratio"] == pytest.approx(1.0, abs=1e-3)
    opt.zero_grad()
    opt.alpha = 0.0
    opt.regularize(problem.h_closure)
    assert math.isnan(opt.read_diagnostics()["drop_ratio"])
