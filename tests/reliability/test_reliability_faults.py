"""Faults at every point of a step: operators, allocations, bytecodes, what is not finite."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import Counts
from tests.interrupts import InterruptAt
from tests.reference import Loss
from tests.trainees import (
    KINDS,
    Parts,
    Trainee,
    in_base_step,
    leftovers,
    next_step_is_right,
    same_bits,
    verdict,
)
from torch_booster import BoosterOptimizer


class BoomError(Exception):
    pass


class Disturbed:
    """A training on its way, and where it stands before and after the step to be disturbed."""

    def __init__(self, kind: str) -> None:
        self.trainee, self.twin = Trainee(kind), Trainee(kind)
        self.trainee.step()
        self.before = self.trainee.snapshot()
        self.after = self.twin.stepped_from(self.before)

    def lost(self, where: str, in_base: bool, anywhere: bool = False) -> list[str]:
        """What is lost after an interruption at `where`; the trainee starts anew afterwards."""
        found = []
        if verdict(self.trainee, self.before, self.after, in_base) == "lost":
            found.append("weights or optimizer state")
        if not anywhere:  # a hook can stay if Ctrl-C falls within the line that registers it
            found += leftovers(self.trainee)
        torch.set_grad_enabled(True)
        if not found and not next_step_is_right(self.trainee, self.twin):
            found.append("the next step")
        self.trainee.load(self.before)
        return [f"{what} at {where}" for what in found]


def thinned(points: int, kept: int) -> Sequence[int]:
    """All points, or about so many of them, evenly spread, the last one among them."""
    return range(points)[:: -max(1, points // kept)]


# Every operator


class RaiseAt(TorchDispatchMode):
    """Raises in place of, or after, the k-th operator; counts them where k is None.

    The copy that restores the weights is spared: it allocates nothing, and were it to fail, no
    other copy could do better.
    """

    def __init__(
        self,
        k: int | None,
        error: type[BaseException],
        when: str,
        trainee: Trainee,
        weights: list[Tensor],
    ) -> None:
        super().__init__()
        self.k, self.error, self.when = k, error, when
        self.home = {p.data_ptr(): w for p, w in zip(trainee.params, weights, strict=True)}
        self.count = 0
        self.hit: tuple[str, bool] = ("", False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = self._counts(func, args)
        self.count += counted
        mine = counted and self.count - 1 == self.k
        if mine:
            self.hit = (f"{self.when} operator {self.k}, {func}", in_base_step(sys._getframe()))
        if mine and self.when != "after":
            raise self.error("boom")
        result = func(*args, **kwargs)
        if mine:
            raise self.error("boom")
        return result

    def _counts(self, func: Any, args: Any) -> bool:
        if func is torch.ops.aten._foreach_copy_.default and self._restores(*args[:2]):
            return False
        return self.when != "in place of an allocation" or allocates(func)

    def _restores(self, into: list[Tensor], values: list[Tensor]) -> bool:
        home = [self.home.get(t.data_ptr()) for t in into]
        return None not in home and same_bits(values, [w for w in home if w is not None])


def allocates(func: Any) -> bool:
    """Whether an operator returns a tensor that is none of its arguments nor a view of one."""
    return any(result.alias_info is None for result in func._schema.returns)


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("in place of", BoomError),
        ("after", KeyboardInterrupt),
        ("in place of an allocation", torch.OutOfMemoryError),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_error_at_every_operator(
    kind: str, when: str, error: type[BaseException], full: bool, counts: Counts
) -> None:
    disturbed = Disturbed(kind)
    trainee, weights = disturbed.trainee, disturbed.before.weights
    with RaiseAt(None, error, when, trainee, weights) as counting:
        trainee.step()
    assert counting.count > 30
    points = thinned(counting.count, 1_000 if full else 12)
    losses = []
    for k in points:
        trainee.load(disturbed.before)
        with pytest.raises(error, match="boom"), RaiseAt(k, error, when, trainee, weights) as mode:
            trainee.step()
        losses.append(disturbed.lost(*mode.hit))
    counts.add(FAULTS[when], len(points), sum(map(bool, losses)))
    assert not list(filter(None, losses))


FAULTS = {
    "in place of": "error in place of an operator",
    "after": "Ctrl-C after an operator",
    "in place of an allocation": "out of memory in an allocation",
}


def test_the_weights_come_back_where_ctrl_c_left_gradients_enabled() -> None:
    """As it does within the exit of `enable_grad`; leaves then refuse to be written in place."""
    param = torch.nn.Parameter(torch.ones(3))
    opt = BoosterOptimizer(torch.optim.SGD([param], lr=0.1), self_check=False)
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = param.pow(3).sum()
        loss.backward()
        return loss

    class Interrupted:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            torch._C._set_grad_enabled(True)
            raise KeyboardInterrupt

    opt.no_sync = Interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        opt.regularize(closure)
    assert passes == 2
    assert torch.equal(param, torch.ones(3))


# The allocator refusing

MEGABYTE = 2**20


def _large() -> Parts:
    """Eight weights of a megabyte each."""
    params: list[Tensor] = [nn.Parameter(torch.randn(512, 512)) for _ in range(8)]

    def bowl(target: float) -> Loss:
        def loss(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([(p - target).square().mean() for p in values]).sum()

        return loss

    return bowl(0.5), bowl(-0.5), params, torch.optim.AdamW(params, lr=1e-3)


def answer_refusals(rounds: str) -> None:
    """The worker: takes steps with ever more memory left, prints what became of each."""
    import resource

    torch.set_num_threads(1)
    KINDS["large"] = _large
    disturbed = Disturbed("large")
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    for number in range(int(rounds)):
        headroom = number * 48 * MEGABYTE // int(rounds)
        disturbed.trainee.load(disturbed.before)
        disturbed.trainee.opt.zero_grad()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        refused, in_base = "", False
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + headroom, most))
            disturbed.trainee.step()
        except (MemoryError, RuntimeError) as error:
            refused = str(error) or "MemoryError"
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            in_base = in_base_step(frames[-1])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        lost = disturbed.lost(f"{headroom:,} bytes", in_base)
        print(json.dumps({"refused": refused, "lost": lost}), flush=True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_the_allocator_refuses(full: bool, counts: Counts) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.reliability.test_reliability_faults",
            str(320 if full else 10),
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    refused = [answer for answer in answers if answer["refused"]]
    assert all("memory" in answer["refused"].lower() for answer in refused)
    assert 0 < len(refused) < len(answers), "some steps were to be refused memory, and some not"
    losses = [answer for answer in answers if answer["lost"]]
    counts.add("memory refused by the allocator", len(refused), len(losses))
    assert not losses


# Losses and gradients that are not finite

NOT_FINITE = (math.nan, math.inf, -math.inf)


class NotFiniteError(Exception):
    pass


def guard(base: torch.optim.Optimizer, *_: object) -> None:
    """What a careful loop has before its step, as `clip_grad_norm_(error_if_nonfinite=True)`."""
    grads = [p.grad for group in base.param_groups for p in group["params"] if p.grad is not None]
    if not all(bool(g.isfinite().all()) for g in grads):
        raise NotFiniteError


def poisoned_losses(trainee: Trainee) -> Iterator[tuple[str, Any]]:
    """Ways to make the loss of each pass not finite; each undoes itself."""

    @contextmanager
    def poisoned(name: str, call: int, value: float) -> Iterator[None]:
        loss_of, calls = getattr(trainee, name), itertools.count()
        times = lambda: value if next(calls) == call else 1.0  # noqa: E731
        setattr(trainee, name, lambda values: times() * loss_of(values))
        yield
        setattr(trainee, name, loss_of)

    calls = {"h_of": 2, "f_of": 2 if trainee.kind == "staged" else 1}
    for name, value in itertools.product(calls, NOT_FINITE):
        for call in range(calls[name]):
            where = f"call {call} of {name}, loss times {value}"
            yield where, functools.partial(poisoned, name, call, value)


def poisoned_gradients(trainee: Trainee) -> Iterator[tuple[str, Any]]:
    """Ways to make one element of one gradient of each pass not finite; each undoes itself."""

    @contextmanager
    def poisoned(param: Tensor, call: int, value: float) -> Iterator[list[int]]:
        calls = [0]

        def hook(grad: Tensor) -> Tensor:
            grad = grad.clone()
            if calls[0] == call:
                grad.view(-1)[0] = value
            calls[0] += 1
            return grad

        handle = param.register_hook(hook)
        yield calls
        handle.remove()

    for index, param in enumerate(trainee.params):
        with poisoned(param, -1, math.nan) as passes:
            trainee.step()
        for call, value in itertools.product(range(passes[0]), NOT_FINITE):
            where = f"pass {call}, gradient {index} with {value}"
            yield where, functools.partial(poisoned, param, call, value)


@pytest.mark.parametrize("poisons", [poisoned_losses, poisoned_gradients])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_reaches_the_base_optimizer_alone(
    kind: str, poisons: Any, full: bool, counts: Counts
) -> None:
    """It shows in `.grad`, where the loop can stop it; the weights are as they were."""
    disturbed = Disturbed(kind)
    trainee = disturbed.trainee
    trainee.opt.base_optimizer.register_step_pre_hook(guard)
    ways = list(poisons(trainee))
    chosen = [ways[i] for i in thinned(len(ways), 500 if full else 12)]
    losses = []
    for where, poisoned in chosen:
        trainee.load(disturbed.before)
        with poisoned(), pytest.raises(NotFiniteError):
            trainee.step()
        losses.append(disturbed.lost(where, in_base=False))
    what = poisons.__name__.removeprefix("poisoned_")
    counts.add(f"NaN and infinite {what}", len(chosen), sum(map(bool, losses)))
    assert not list(filter(None, losses))


# Every bytecode at which Python may run a signal handler


@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="the points are those of CPython's interpreter"
)
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_every_bytecode(kind: str, full: bool, counts: Counts) -> None:
    disturbed = Disturbed(kind)
    trainee = disturbed.trainee
    with InterruptAt(None) as counting:
        trainee.step()
    points = thinned(counting.count, 2_500 if full else 20)
    losses = []
    for k in points:
        trainee.load(disturbed.before)
        with pytest.raises(KeyboardInterrupt), InterruptAt(k) as interrupt:
            trainee.step()
        losses.append(disturbed.lost(*interrupt.hit, anywhere=True))
    counts.add("Ctrl-C at a bytecode", len(points), sum(map(bool, losses)))
    assert not list(filter(None, losses))


if __name__ == "__main__":
    answer_refusals(*sys.argv[1:])
