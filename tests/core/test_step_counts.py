"""What a step costs, counted: operators of the arithmetic, and their growth with the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("rich", reason="the examples extra is absent")

from benchmarks import step_cost

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


def operators(run: Callable[[], object]) -> Counter[str]:
    with Operators() as mode:
        run()
    return mode.counts


def beyond_the_passes(tensors: int, staged: bool) -> Counter[str]:
    """Operators of one step less those of its closures and of the base step."""
    step, floor = (
        contestant(step_cost.arithmetic(tensors, 3, "cpu", "small"))
        for contestant in (
            step_cost.booster_staged if staged else step_cost.booster,
            step_cost.floor,
        )
    )
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
