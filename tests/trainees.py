"""Small trainings to interrupt, and what must hold of them afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.problems import make_problem
from tests.reference import Loss, booster_gradient
from torch_booster import BoosterOptimizer
from torch_booster.hyperparameters import STEP

LAM, ALPHA = 5.0, 0.1


class Snapshot(NamedTuple):
    """Weights and optimizer state, copied."""

    weights: list[Tensor]
    optimizer: dict[str, Any]

    def equals(self, other: Snapshot) -> bool:
        """Whether every bit is the same."""
        return same_bits(self.weights, other.weights) and same(self.optimizer, other.optimizer)


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether tensors are equal bit for bit, so that 0 is not −0 and NaN is NaN."""
    return all(
        x.dtype == y.dtype and torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True)
    )


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """The same for nested dictionaries and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same_bits([a], [b])
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Trainee:
    """Parameters, two losses, a wrapped optimizer and one way to step it.

    Everything is a function of the kind, so that a twin goes the same way.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.f_of, self.h_of, self.params, base = KINDS[kind]()
        # The first step runs as the others: the look at the closure has tests of its own.
        self.opt = BoosterOptimizer(base, LAM, ALPHA, self_check=False)

    def _closure(self, loss_of: Loss, share: float = 1.0) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            if self.kind == "zeroing":
                self.opt.zero_grad()
            loss = share * loss_of(self.params)
            loss.backward()
            return loss

        return closure

    def step(self) -> None:
        """One Booster step, from fresh gradients."""
        self.opt.zero_grad()
        if self.kind == "staged":
            self.opt.regularize(self._closure(self.h_of))
            for _ in range(2):
                self._closure(self.f_of, 0.5)()
            self.opt.step()
        else:
            self.opt.step(self._closure(self.f_of), self._closure(self.h_of))

    def snapshot(self) -> Snapshot:
        weights = [p.detach().clone() for p in self.params]
        return Snapshot(weights, copy.deepcopy(self.opt.state_dict()))

    def load(self, snapshot: Snapshot) -> None:
        with torch.no_grad():
            for p, w in zip(self.params, snapshot.weights, strict=True):
                p.copy_(w)
        self.opt.load_state_dict(copy.deepcopy(snapshot.optimizer))

    def stepped_from(self, snapshot: Snapshot) -> Snapshot:
        """Where an undisturbed step leads."""
        self.load(snapshot)
        self.step()
        return self.snapshot()


def verdict(trainee: Trainee, before: Snapshot, after: Snapshot, in_base: bool) -> str:
    """What an interruption left: a step not taken or taken, the base's own part, or neither.

    The step is counted right after the base's own. In between, one is missing from the count.
    """
    found = trainee.snapshot()
    if found.equals(before):
        return "not taken"
    if found.equals(after):
        return "taken"
    if in_base:
        return "within the base step"
    for group in found.optimizer["param_groups"]:
        group[STEP] += 1
    return "taken, not counted" if found.equals(after) else "lost"


def leftovers(trainee: Trainee) -> list[str]:
    """What an error may leave besides weights: hooks on the parameters, a grad mode."""
    found = []
    hooks = sum(len(p._post_accumulate_grad_hooks or {}) for p in trainee.params)  # type: ignore[attr-defined]
    if hooks > (trainee.opt._now.waiting is not None):  # one watches a regulariser that waits
        found.append("hook")
    if not torch.is_grad_enabled():
        found.append("grad mode")
    return found


def next_step_is_right(trainee: Trainee, twin: Trainee) -> bool:
    """Steps once more, as its undisturbed twin does from there and as the oracle says."""
    start = trainee.snapshot()
    expected = booster_gradient(trainee.f_of, trainee.h_of, trainee.params, LAM, ALPHA)
    trainee.step()
    if not trainee.snapshot().equals(twin.stepped_from(start)):
        return False
    return any(p.dtype is not torch.float64 for p in trainee.params) or all(
        torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
        for p, g in zip(trainee.params, expected, strict=True)
        if g is not None
    )


def in_base_step(frame: FrameType | None) -> bool:
    """Whether a frame belongs to the update of one of torch's optimizers."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "optim" and path.stem in ("adam", "adamw", "sgd"):
            return True
        frame = frame.f_back
    return False


# --------------------------------------------------------------------------------------- kinds

Parts = tuple[Loss, Loss, list[Tensor], torch.optim.Optimizer]


def _mlp(make_base: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Parts:
    problem = make_problem()
    params = [p for name, p in problem.model.named_parameters() if p.requires_grad]
    return problem.f_of, problem.h_of, params, make_base(params)


class Bowl(torch.autograd.Function):
    """½Σ‖p − c‖² of many tensors in three calls, so that a step is mostly the package's code."""

    @staticmethod
    def forward(ctx: Any, centres: list[Tensor], *params: Tensor) -> Tensor:
        ctx.differences = torch._foreach_sub(params, centres)
        return torch.stack(torch._foreach_norm(ctx.differences)).square().sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, *torch._foreach_mul(ctx.differences, grad)


def _many() -> Parts:
    torch.manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(2, dtype=torch.float64)) for _ in range(200)]
    centres = [torch.randn_like(p) for p in params]

    def f(values: Sequence[Tensor]) -> Tensor:
        return Bowl.apply([-c for c in centres], *values)

    def h(values: Sequence[Tensor]) -> Tensor:
        return Bowl.apply(centres, *values)

    return f, h, params, torch.optim.SGD(params, lr=0.01, foreach=True)


def _mixed() -> Parts:
    torch.manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16] * 2
    params: list[Tensor] = [nn.Parameter(torch.randn(3).to(dtype)) for dtype in dtypes]

    def bowl(target: float) -> Loss:
        def loss(values: Sequence[Tensor]) -> Tensor:
            terms = [(1 + (p.double() - target).square()).log().sum() for p in values]
            return torch.stack(terms).sum()

        return loss

    return bowl(0.5), bowl(-0.5), params, torch.optim.SGD(params, lr=0.05, momentum=0.9)


KINDS: dict[str, Callable[[], Parts]] = {
    "one call": lambda: _mlp(lambda params: torch.optim.AdamW(params, lr=1e-3)),
    "staged": lambda: _mlp(lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9)),
    "zeroing": lambda: _mlp(lambda params: torch.optim.AdamW(params, lr=1e-3)),
    "mixed dtypes": _mixed,
    "many tensors": _many,
}
