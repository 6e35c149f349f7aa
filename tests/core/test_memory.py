"""Peak memory of the regulariser, in units of the trainable weights, counted by the allocator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.live_memory import peak_bytes
from torch_booster import BoosterOptimizer

TENSORS, SIZE = 64, 4096
WEIGHTS = TENSORS * SIZE * 4  # bytes
SLACK = 4 / TENSORS  # a few tensors under way at a time


class Many:
    """Many equal tensors and a loss that goes through them one at a time."""

    def __init__(self, accumulates: bool = False) -> None:
        self.params = [nn.Parameter(torch.randn(SIZE)) for _ in range(TENSORS)]
        self.scales = [torch.rand(SIZE) for _ in range(TENSORS)]
        base = torch.optim.SGD(self.params, lr=0.1)
        # The look at the closure takes a copy of its own, once in a run.
        self.opt = BoosterOptimizer(base, 5.0, 0.1, accumulates=accumulates, self_check=False)

    def accumulate(self) -> Tensor:
        total = torch.zeros(())
        for param, scale in zip(self.params, self.scales, strict=True):
            loss = (param * param * scale).sum()
            loss.backward()
            total += loss.detach()
        return total

    def in_micro_batches(self) -> Tensor:
        return self.accumulate() + self.accumulate()

    def zero_to_none(self) -> Tensor:
        self.opt.zero_grad()
        return self.accumulate()

    def zero_in_place(self) -> Tensor:
        self.opt.zero_grad(set_to_none=False)
        return self.accumulate()


@pytest.mark.parametrize(
    ("closure", "copies"),
    [("accumulate", 2), ("in_micro_batches", 2), ("zero_to_none", 2), ("zero_in_place", 2)],
)
def test_peak_beyond_the_gradients(closure: str, copies: int) -> None:
    check_peak(Many(), closure, copies)


@pytest.mark.parametrize("closure", ["accumulate", "in_micro_batches"])
def test_a_closure_that_promises_to_accumulate_saves_a_copy(closure: str) -> None:
    check_peak(Many(accumulates=True), closure, 1)


def check_peak(many: Many, closure: str, copies: int) -> None:
    run = getattr(many, closure)
    gradients = 1  # .grad is None before the call and there after it

    staged = peak_bytes(lambda: many.opt.regularize(run)) / WEIGHTS
    assert copies + gradients - SLACK < staged < copies + gradients + SLACK

    many.opt.zero_grad()
    one_call = peak_bytes(lambda: many.opt.step(run, run)) / WEIGHTS
    assert one_call < copies + gradients + SLACK


@pytest.mark.parametrize("closure", ["zero_to_none", "zero_in_place"])
def test_stale_gradients_of_zeroing_closures_are_set_aside(closure: str) -> None:
    """From the second step on the last step's gradients are there before the first."""
    many = Many()
    run = getattr(many, closure)

    def two_steps() -> None:
        many.opt.step(run, run)
        many.opt.step(run, run)

    assert peak_bytes(two_steps) / WEIGHTS < 1 + 2 + 1 + SLACK


def test_gradients_that_are_kept_cost_their_copy() -> None:
    many = Many()

    def regularize_on_top() -> None:
        many.accumulate()
        many.opt.regularize(many.accumulate)

    assert peak_bytes(regularize_on_top) / WEIGHTS < 1 + 2 + 1 + SLACK


@pytest.mark.parametrize("accumulates", [False, True])
def test_frozen_weights_that_are_perturbed_cost_their_values_and_a_gradient(
    accumulates: bool,
) -> None:
    many = Many()
    for param in many.params:
        param.requires_grad_(False)
    adapter = nn.Parameter(torch.ones(()))
    base = torch.optim.SGD([adapter], lr=0.1)
    options = {"accumulates": accumulates, "self_check": False}
    opt = BoosterOptimizer(base, 5.0, 0.1, perturbed=many.params, **options)

    def closure() -> Tensor:
        total = torch.zeros(())
        for param, scale in zip(many.params, many.scales, strict=True):
            loss = (adapter * param * param * scale).sum()
            loss.backward()
            total += loss.detach()
        return total

    assert 2 - SLACK < peak_bytes(lambda: opt.regularize(closure)) / WEIGHTS < 2 + SLACK


def test_nothing_stays_allocated() -> None:
    many = Many()
    for _ in range(2):
        many.opt.zero_grad()
        many.opt.step(many.accumulate, many.accumulate)
    held = [v for v in vars(many.opt).values() if isinstance(v, Tensor) and v.numel() > 1]
    assert held == []


def test_narrow_weights_are_perturbed_without_wide_copies_of_all() -> None:
    params = [nn.Parameter(torch.randn(SIZE, dtype=torch.bfloat16)) for _ in range(TENSORS)]
    opt = BoosterOptimizer(torch.optim.SGD(params, lr=0.1), 5.0, 0.1, self_check=False)

    def closure() -> Tensor:
        losses: list[Tensor] = []
        for param in params:
            loss = param.square().sum()
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    held = peak_bytes(lambda: opt.regularize(closure)) / (WEIGHTS / 2)
    assert held < 1 + 2 + 2 * SLACK  # the tensor under way is in float32
