"""What a step costs, counted: operators of the arithmetic, and their growth with the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_booster import BoosterOptimizer

ALLOCATES = {"empty_like", "new_empty_strided", "detach", "alias"}  # no kernel


class Operators(TorchDispatchMode):
    """Counts the operators that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in ALLOCATES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Written(torch.autograd.Function):
    """Hands out gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.gradients


def closure_on(params: list[nn.Parameter]) -> Callable[[], Tensor]:
    gradients = [torch.randn_like(p) for p in params]

    def closure() -> Tensor:
        loss = Written.apply(gradients, *params)
        loss.backward()
        return loss.detach()

    return closure


def operators(run: Callable[[], object]) -> Counter[str]:
    with Operators() as mode:
        run()
    return mode.counts


def beyond_the_passes(tensors: int, staged: bool) -> Counter[str]:
    """Operators of one step less those of its closures and of the base step."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(tensors)]
    closure = closure_on(params)
    opt = BoosterOptimizer(torch.optim.SGD(params, lr=0.1, foreach=True), 5.0, 0.1)

    def step() -> None:
        opt.zero_grad()
        if not staged:
            opt.step(closure, closure)
            return
        opt.regularize(closure)
        closure()
        opt.step()

    def floor() -> None:
        opt.zero_grad()
        closure()
        closure()
        closure()
        opt.base_optimizer.step()

    counts = operators(step)
    counts.subtract(operators(floor))
    return counts


@pytest.mark.parametrize("staged", [False, True], ids=["one_call", "staged"])
def test_operators_do_not_grow_with_the_tensors(staged: bool) -> None:
    few, many = beyond_the_passes(2, staged), beyond_the_passes(200, staged)
    # autograd copies a first gradient and adds a later one, one call either way
    assert many.total() == few.total(), many - few
    foreach = sum(n for name, n in many.items() if name.startswith("_foreach"))
    assert foreach <= 12, many
