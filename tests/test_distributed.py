"""On any number of processes the run equals the single-process run on the global batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.multi_process import run_cases
from torch_booster import BoosterOptimizer

STEPS = 20
ATOL = 1e-12
Closure = Callable[[], Tensor]


class Net(nn.Module):
    """`align_only` serves f alone, `harm_only` h alone, `unused` neither."""

    def __init__(self, branches: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner = nn.Linear(4, 8)
        self.outer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.branches = branches
        if branches:
            self.align_only = nn.Linear(4, 4)
            self.harm_only = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor, harmful: bool) -> Tensor:
        y = self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))
        if self.branches:
            y = y + (self.harm_only if harmful else self.align_only)(x)
        return y


def batches(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    shape = (8, 4)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name in ("f_x", "f_y", "h_x", "h_y")
    }


def base_optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def reference(branches: bool, clip: float | None, steps: int = STEPS) -> dict[str, Tensor]:
    """The formula on one process and the global batch, by autograd.grad on clones."""
    model = Net(branches)
    base = base_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.5, STEPS)
    names = [name for name, _ in model.named_parameters()]

    def gradient(at: dict[str, Tensor], x: Tensor, y: Tensor, harmful: bool) -> list[Tensor | None]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in at.items()}
        out = torch.func.functional_call(model, leaves, (x, harmful))
        loss = nn.functional.mse_loss(out, y)
        return list(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))

    for step in range(steps):
        batch = batches(step)
        w = dict(model.named_parameters())
        g_f = gradient(w, batch["f_x"], batch["f_y"], False)
        g_h = gradient(w, batch["h_x"], batch["h_y"], True)
        norm = sum(float(g.square().sum()) for g in g_h if g is not None) ** 0.5
        w_prime = {
            name: w[name] if g is None else w[name] - 0.1 * g / (norm + 1e-7)
            for name, g in zip(names, g_h, strict=True)
        }
        q = gradient(w_prime, batch["h_x"], batch["h_y"], True)
        for name, gf, gh, gq in zip(names, g_f, g_h, q, strict=True):
            parts = [gf] if gh is None or gq is None else [gf, 5.0 * (gh - gq)]
            present = [part for part in parts if part is not None]
            w[name].grad = sum(present[1:], present[0]) if present else None
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        base.step()
        scheduler.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def share(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world)[rank]


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


def assert_same(model: nn.Module, expected: dict[str, Tensor], atol: float = ATOL) -> None:
    found = {name.removeprefix("module."): full(p.detach()) for name, p in model.named_parameters()}
    for name, value in expected.items():
        difference = (found[name] - value).abs().max().item()
        assert difference <= atol, f"{name} is {difference} off"


def train(
    model: nn.Module,
    opt: BoosterOptimizer,
    *,
    rank: int = 0,
    world: int = 1,
    usage: str = "staged",
    zeroing: bool = False,
    alignment_parts: int = 1,
    harmful_parts: int = 1,
    uneven: bool = False,
    clip: float | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    steps: int = STEPS,
) -> None:
    """The user's loop: this rank's share of the global batch, maybe in micro-batches."""
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.5, STEPS)
    for step in range(steps):
        batch = {name: share(x, rank, world) for name, x in batches(step).items()}

        def passes(
            x: Tensor, y: Tensor, harmful: bool, parts: int, batch: dict[str, Tensor] = batch
        ) -> Tensor:
            rows = len(x)
            sizes = [1] * (parts - 1) + [rows - parts + 1] if uneven else [rows // parts] * parts
            total = torch.zeros((), dtype=torch.float64)
            pieces = list(zip(x.split(sizes), y.split(sizes), strict=True))
            for index, (x_part, y_part) in enumerate(pieces):
                with nullcontext() if index == len(pieces) - 1 else no_sync():
                    loss = nn.functional.mse_loss(model(x_part, harmful), y_part)
                    loss = loss * len(x_part) / rows
                    loss.backward()
                total += loss.detach()
            return total

        def alignment(batch: dict[str, Tensor] = batch) -> Tensor:
            if zeroing:
                opt.zero_grad()
            return passes(batch["f_x"], batch["f_y"], False, alignment_parts)

        def harmful(batch: dict[str, Tensor] = batch) -> Tensor:
            if zeroing:
                opt.zero_grad()
            return passes(batch["h_x"], batch["h_y"], True, harmful_parts)

        if usage == "one_call":
            if not zeroing:
                opt.zero_grad()
            opt.step(alignment, harmful)
        else:
            opt.zero_grad()
            opt.regularize(harmful)
            passes(batch["f_x"], batch["f_y"], False, alignment_parts)
            if clip is not None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                assert full(norm).isfinite()
            opt.step()
        scheduler.step()


# Plain DDP


def counting_all_reduce(sent: list[int], bucket):  # type: ignore[no-untyped-def]
    """A communication hook that averages and notes how many elements went out."""
    sent.append(bucket.buffer().numel())
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def ddp_case(
    rank: int,
    *,
    branches: bool = True,
    reductions: int | None = None,
    local_second_pass: bool = False,
    ddp: dict[str, bool] | None = None,
    clip: float | None = None,
    **loop: Any,
) -> None:
    options = {"find_unused_parameters": branches, **(ddp or {})}
    model = DistributedDataParallel(Net(branches), **options)
    sent: list[int] = []
    if reductions is not None:
        model.register_comm_hook(sent, counting_all_reduce)
    opt = BoosterOptimizer(
        base_optimizer(model.parameters()),
        5.0,
        0.1,
        no_sync=model.no_sync if local_second_pass else None,
    )
    train(model, opt, rank=rank, world=2, clip=clip, no_sync=model.no_sync, **loop)
    assert_same(model, reference(branches, clip))
    if reductions is not None:
        elements = sum(p.numel() for p in model.parameters())
        assert sum(sent) == reductions * elements * STEPS


def ddp_refuses_a_local_first_pass(rank: int) -> None:
    model = DistributedDataParallel(Net(False))
    opt = BoosterOptimizer(base_optimizer(model.parameters()))
    x = torch.full((2, 4), float(rank), dtype=torch.float64)

    def harmful() -> Tensor:
        loss = model(x, True).square().mean()
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with model.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
        opt.regularize(harmful)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    independent = BoosterOptimizer(base_optimizer(model.parameters()), independent_ranks=True)
    with model.no_sync():
        independent.regularize(harmful)


def ddp_no_sync_needs_accumulating_alignment(rank: int) -> None:
    model = DistributedDataParallel(Net(False))
    opt = BoosterOptimizer(base_optimizer(model.parameters()), no_sync=model.no_sync)
    x = torch.ones((2, 4), dtype=torch.float64)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x, True).square().mean()
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="zeroed the regulariser"):
        opt.step(closure, closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


TWO: dict[str, Callable[[int], None]] = {}
for usage in ("staged", "one_call"):
    for view in (False, True):
        flags = {"gradient_as_bucket_view": view}
        tag = f"{usage}{'_bucket_view' if view else ''}"
        case = partial(ddp_case, usage=usage, ddp=flags)
        TWO |= {
            f"ddp_{tag}": case,
            f"ddp_{tag}_closures_zero": partial(case, zeroing=True),
            f"ddp_{tag}_micro_batches": partial(case, alignment_parts=2, harmful_parts=4),
            f"ddp_{tag}_uneven": partial(case, alignment_parts=3, harmful_parts=2, uneven=True),
            f"ddp_{tag}_no_branches": partial(case, branches=False),
            f"ddp_{tag}_static_graph": partial(
                ddp_case, usage=usage, branches=False, ddp={**flags, "static_graph": True}
            ),
            f"ddp_{tag}_three_reductions": partial(case, branches=False, reductions=3),
            f"ddp_{tag}_two_reductions": partial(
                case, branches=False, reductions=2, local_second_pass=True
            ),
            f"ddp_{tag}_two_reductions_branches": partial(
                case, local_second_pass=True, harmful_parts=2, alignment_parts=2
            ),
        }
        if usage == "staged":
            TWO[f"ddp_{tag}_clip"] = partial(case, clip=0.5, alignment_parts=2)
TWO |= {
    "ddp_refuses_a_local_first_pass": ddp_refuses_a_local_first_pass,
    "ddp_no_sync_needs_accumulating_alignment": ddp_no_sync_needs_accumulating_alignment,
}


@pytest.fixture(scope="module")
def two() -> dict[str, str | None]:
    return run_cases(TWO, 2)


@pytest.mark.parametrize("name", TWO)
def test_two_processes(name: str, two: dict[str, str | None]) -> None:
    if two[name] is not None:
        pytest.fail(two[name], pytrace=False)  # type: ignore[arg-type]


def test_the_reference_is_the_single_process_run() -> None:
    for branches in (False, True):
        model = Net(branches)
        train(model, BoosterOptimizer(base_optimizer(model.parameters()), 5.0, 0.1))
        assert_same(model, reference(branches, None))
