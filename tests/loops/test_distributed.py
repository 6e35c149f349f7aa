"""On any number of processes the run equals the single-process run on the global batch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.multi_process import run_cases
from tests.reference import Loss, booster_gradient
from torch_booster import BoosterOptimizer

STEPS = 20
ATOL = 1e-12
Closure = Callable[[], Tensor]


class Net(nn.Module):
    """`align_only` serves f alone, `harm_only` h alone, `unused` neither."""

    def __init__(self, branches: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)  # of the device: both sides of a comparison are built on one
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


def device() -> torch.device:
    """The CPU, or this rank's GPU."""
    return torch.get_default_device()


def batches(step: int) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(100 + step)
    shape = (8, 4)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            device()
        )
        for name in ("f_x", "f_y", "h_x", "h_y")
    }


def base_optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


@lru_cache  # the cases share a few
def reference(
    branches: bool, clip: float | None, steps: int = STEPS, norm: str = "global"
) -> dict[str, Tensor]:
    """The formula on one process and the global batch, by autograd.grad on clones."""
    model = Net(branches)
    base = base_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.5, STEPS)
    params = dict(model.named_parameters())

    def loss_on(x: Tensor, y: Tensor, harmful: bool) -> Loss:
        def loss(values: Sequence[Tensor]) -> Tensor:
            at = dict(zip(params, values, strict=True))
            return nn.functional.mse_loss(torch.func.functional_call(model, at, (x, harmful)), y)

        return loss

    for step in range(steps):
        batch = batches(step)
        f = loss_on(batch["f_x"], batch["f_y"], False)
        h = loss_on(batch["h_x"], batch["h_y"], True)
        grads = booster_gradient(f, h, list(params.values()), 5.0, 0.1, norm=norm)
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = grad
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        base.step()
        scheduler.step()
    return {name: p.detach() for name, p in params.items()}


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
    alignment_first: bool = False,
    first: int = 0,
    steps: int = STEPS,
) -> None:
    """The user's loop: this rank's share of the global batch, maybe in micro-batches."""
    for group in opt.param_groups:
        group["initial_lr"] = 1e-2
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.5, STEPS, last_epoch=first - 1)
    for step in range(first, steps):
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
            if alignment_first:  # the averaged gradient then lies in DDP's own memory
                passes(batch["f_x"], batch["f_y"], False, alignment_parts)
            opt.regularize(harmful)
            if not alignment_first:
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
    norm: Any = "global",
    accumulates: bool = False,
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
        self_check=reductions is None,  # it would be counted
        norm=norm,
        accumulates=accumulates,
    )
    train(model, opt, rank=rank, world=2, clip=clip, no_sync=model.no_sync, **loop)
    assert_same(model, reference(branches, clip, norm=norm))
    if reductions is not None:
        elements = sum(p.numel() for p in model.parameters())
        assert sum(sent) == reductions * elements * STEPS


def ddp_refuses_a_local_first_pass(rank: int, *, bucket_view: bool, zeroing: bool) -> None:
    model = DistributedDataParallel(Net(False), gradient_as_bucket_view=bucket_view)
    opt = BoosterOptimizer(base_optimizer(model.parameters()))
    x = torch.full((2, 4), float(rank), dtype=torch.float64)

    def harmful() -> Tensor:
        if zeroing:
            model.zero_grad()
        for _ in range(2):
            loss = model(x, True).square().mean()
            loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with model.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
        opt.regularize(harmful)  # measured once in a run
    assert all(p.grad is None for p in model.parameters())
    opt = BoosterOptimizer(base_optimizer(model.parameters()))
    opt.regularize(harmful)  # synchronised, twice in one closure: nothing to refuse
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


def ddp_perturbs_frozen_weights(rank: int, *, norm: Any) -> None:
    """DDP leaves gradients of frozen weights to each rank; the step takes their mean."""
    models = []
    for of, world in ((0, 1), (rank, 2)):
        model = Net(False)
        model.inner.requires_grad_(False)
        wrapped = model if world == 1 else DistributedDataParallel(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = model.inner.parameters()
        opt = BoosterOptimizer(base_optimizer(trained), 5.0, 0.1, norm=norm, perturbed=frozen)
        train(wrapped, opt, rank=of, world=world)
        models.append(model)
    alone, together = models
    assert_same(together, {name: p.detach() for name, p in alone.named_parameters()})


def ddp_perturbs_beside_merged_weights(rank: int) -> None:
    """Offsets are no parameters of the model that DDP wraps; the step takes their mean."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from torch_booster.integrations.peft import MergedOffsets, merged_weights

    models = []
    for of, world, offsets in ((0, 1, False), (0, 1, True), (rank, 2, True)):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
        model = peft.get_peft_model(Net(False), lora)
        wrapped = model if world == 1 else DistributedDataParallel(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        perturbed = MergedOffsets(model) if offsets else merged_weights(model)
        opt = BoosterOptimizer(base_optimizer(trained), 5.0, 0.1, perturbed=perturbed)
        train(wrapped, opt, rank=of, world=world)
        models.append(model)
    direct, alone, together = models
    wanted = {name: p.detach() for name, p in direct.named_parameters()}
    assert_same(alone, wanted)
    assert_same(together, wanted)


def ddp_perturbs_experts(rank: int) -> None:
    """Each rank's batch reaches another of the frozen weights; all ranks move both alike."""
    model = Net(False)
    model.inner.requires_grad_(False)
    experts = [nn.Parameter(torch.ones(4).double(), requires_grad=False) for _ in range(2)]
    wrapped = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = BoosterOptimizer(base_optimizer(trained), 5.0, 0.1, perturbed=experts)
    seen: list[list[Tensor]] = []

    def harmful() -> Tensor:
        seen.append([p.detach().clone() for p in experts])
        x = torch.full((2, 4), 1.0 + rank, dtype=torch.float64) * experts[rank]
        loss = wrapped(x, True).square().mean()
        loss.backward()
        return loss

    opt.zero_grad()
    opt.regularize(harmful)
    moves = torch.stack([b - a for a, b in zip(seen[-2], seen[-1], strict=True)])
    everyone = [torch.empty_like(moves) for _ in range(2)]
    dist.all_gather(everyone, moves)
    assert torch.equal(*everyone)
    assert all(move.any() for move in moves)


class Slope(nn.Module):
    """h = w on one rank, −w/2 + k·(w − 1)² on the other: w′ is down the slope of both together."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, rank: int, bent: float) -> Tensor:
        return self.w if rank == 0 else -self.w / 2 + bent * (self.w - 1).square()


def ddp_shortens_alpha_alike(rank: int, bent: float, left: float) -> None:
    """A rank alone would have judged otherwise: on the first h falls, on the second it rises."""
    model = Slope()
    wrapped = DistributedDataParallel(model)
    opt = BoosterOptimizer(base_optimizer(model.parameters()), 5.0, 0.1, trust_region=True)

    def harmful() -> Tensor:
        loss = wrapped(rank, bent)
        loss.backward()
        return loss

    opt.zero_grad()
    opt.regularize(harmful)
    assert opt.diagnostics is not None
    assert (opt.diagnostics.harmful_loss_drop.item() > 0) == (rank == 0)
    assert opt.param_groups[0]["booster_trust_region"] == left


def ranks_of_their_own_judge_alone(rank: int) -> None:
    model = Slope()
    opt = BoosterOptimizer(
        *(base_optimizer(model.parameters()), 5.0, 0.1),
        trust_region=True,
        independent_ranks=True,
    )

    def harmful() -> Tensor:
        loss = model(rank, 20.0)
        loss.backward()
        return loss

    for _ in range(1 + rank):  # the others do not wait
        opt.zero_grad()
        opt.regularize(harmful)
    assert opt.param_groups[0]["booster_trust_region"] == (1.0 if rank == 0 else 0.25)


def ddp_refuses_a_bare_module_beside_frozen_weights(rank: int) -> None:
    """What is averaged here is the same on all ranks; what DDP should have averaged is not."""
    model = Net(False)
    model.inner.requires_grad_(False)
    DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = BoosterOptimizer(base_optimizer(trained), perturbed=model.inner.parameters())

    def harmful() -> Tensor:
        loss = model(torch.full((2, 4), float(rank + 1), dtype=torch.float64), True).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no_sync"):
        opt.regularize(harmful)
    assert all(p.grad is None for p in model.parameters())


# Fully sharded and tensor parallel


def fsdp2_case(
    rank: int,
    *,
    branches: bool = False,
    reshard: bool = True,
    clip: float | None = None,
    hold_back: bool = False,
    norm: Any = "global",
    **loop: Any,
) -> None:
    model = Net(branches)
    for layer in (model.inner, model.outer):
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    opt = BoosterOptimizer(base_optimizer(model.parameters()), 5.0, 0.1, norm=norm)

    @contextmanager
    def no_sync() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    held = no_sync if hold_back else nullcontext
    pointers = [p.to_local().data_ptr() for p in model.parameters()]  # type: ignore[attr-defined]
    train(model, opt, rank=rank, world=2, clip=clip, no_sync=held, **loop)
    assert [p.to_local().data_ptr() for p in model.parameters()] == pointers  # type: ignore[attr-defined]
    assert_same(model, reference(branches, clip, norm=norm))
    assert opt.diagnostics is not None
    # ε counts for more beside the smaller norms of single tensors.
    rel = 1e-6 if norm == "global" else 1e-3
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(0.1, rel=rel)


def fsdp2_refuses_frozen_weights(rank: int) -> None:
    model = Net(False)
    model.inner.requires_grad_(False)
    fully_shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="that is sharded"):
        BoosterOptimizer(base_optimizer(trained), perturbed=model.inner.parameters())


def fsdp2_refuses_a_local_first_pass(rank: int) -> None:
    model = fully_shard(Net(False))
    opt = BoosterOptimizer(base_optimizer(model.parameters()))
    model.set_requires_gradient_sync(False)

    def harmful() -> Tensor:
        loss = model(torch.ones((2, 4), dtype=torch.float64), True).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"no gradients.*set_requires_gradient_sync"):
        opt.regularize(harmful)


def fsdp2_mixed_precision(rank: int) -> None:
    """bfloat16 compute on float32 shards, against the same policy in one process by hand."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for sharded in (True, False):
        model = Net(False).float()
        run: nn.Module = model
        if sharded:
            fully_shard(model, mp_policy=policy)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = BoosterOptimizer(base, 5.0, 0.1, independent_ranks=not sharded)
        batch = {name: x.float() for name, x in batches(0).items()}

        def harmful(run: nn.Module = run, batch: dict[str, Tensor] = batch) -> Tensor:
            x, y = share(batch["h_x"], rank, 2), share(batch["h_y"], rank, 2)
            if run is model and sharded:  # noqa: B023
                loss = nn.functional.mse_loss(run(x, True).float(), y)
            else:
                x, y = batch["h_x"], batch["h_y"]
                narrow = {n: p.bfloat16() for n, p in run.named_parameters()}
                out = torch.func.functional_call(run, narrow, (x.bfloat16(), True))
                loss = nn.functional.mse_loss(out.float(), y)
            loss.backward()
            return loss

        opt.regularize(harmful)
        assert opt.diagnostics is not None
        results.append(opt.diagnostics.harmful_grad_norm.item())
        assert all(full(p.grad).isfinite().all() for p in model.parameters())  # type: ignore[arg-type]
    assert results[0] == pytest.approx(results[1], rel=0.02)


def fsdp1_case(
    rank: int, *, original: bool, strategy: str, parts: int = 1, norm: Any = "global"
) -> None:
    model = FullyShardedDataParallel(
        Net(False),
        use_orig_params=original,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=device(),
    )
    bare = BoosterOptimizer(base_optimizer(model.parameters()))

    def harmful() -> Tensor:
        loss = model(torch.ones((2, 4), dtype=torch.float64), True).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="module=model"):
        bare.regularize(harmful)
    bare.zero_grad()
    opt = BoosterOptimizer(base_optimizer(model.parameters()), 5.0, 0.1, module=model, norm=norm)
    if norm == "tensor" and not original:
        with pytest.raises(RuntimeError, match="use_orig_params=True"):
            opt.regularize(harmful)
        return
    train(model, opt, rank=rank, world=2, alignment_parts=parts, harmful_parts=parts)
    expected = reference(False, None, norm=norm)
    with FullyShardedDataParallel.summon_full_params(model):
        found = {name.split("_fsdp_wrapped_module.")[-1]: p for name, p in model.named_parameters()}
        if not original:
            found = dict(model.module.named_parameters())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= ATOL, name


def tensor_parallel_case(
    rank: int, *, clip: float | None = None, norm: Any = "global", **loop: Any
) -> None:
    """Two sharded layers, a plain one, and a replicated norm: every rank sees the whole batch."""
    mesh = init_device_mesh(device().type, (2,))
    model = Net(False)
    plan = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    opt = BoosterOptimizer(base, 5.0, 0.1, norm=norm)
    train(model, opt, **loop)
    assert_same(model, reference(False, clip, norm=norm))


def two_dimensions_case(rank: int, *, norm: Any = "global", **loop: Any) -> None:
    """FSDP2 over two pairs of tensor-parallel ranks."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("dp", "tp"))
    model = Net(False)
    plan = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    opt = BoosterOptimizer(base, 5.0, 0.1, norm=norm)
    train(model, opt, rank=mesh["dp"].get_local_rank(), world=2, **loop)
    assert_same(model, reference(False, None, norm=norm))
    assert opt.diagnostics is not None
    # ε counts for more beside the smaller norms of single tensors.
    rel = 1e-6 if norm == "global" else 1e-3
    assert opt.diagnostics.perturbation_norm.item() == pytest.approx(0.1, rel=rel)


def one_collective_for_all_norms(rank: int, *, norm: Any) -> None:
    """Of a kind of sharding: here some parameters are sharded, and some are replicated."""
    model = Net(False)
    fully_shard(model.inner)
    fully_shard(model.outer)
    opt = BoosterOptimizer(
        base_optimizer(model.parameters()), 5.0, 0.1, norm=norm, self_check=False
    )
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    def harmful() -> Tensor:
        loss = model(torch.ones((2, 4), dtype=torch.float64), True).square().mean()
        loss.backward()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        opt.regularize(harmful)
    assert sizes == [4]  # weight and bias of the two sharded layers


# Checkpoints


def state_of(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, opt)
    return {"model": weights, "opt": state}


def load_into(model: nn.Module, opt: torch.optim.Optimizer, folder: str, no_dist: bool) -> None:
    found = state_of(model, opt)
    dcp.load(found, checkpoint_id=folder, no_dist=no_dist)
    set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["opt"])


def checkpoint_case(rank: int, *, saved_by: int) -> None:
    """Saved by 2 processes and gone on with by 1, and the other way round: the unbroken run."""
    shared = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(shared)
    folder = shared[0]
    assert folder is not None
    alone, together = Net(False), fully_shard(Net(False))
    opt_alone = BoosterOptimizer(base_optimizer(alone.parameters()), 5.0, 0.1)
    opt_alone.independent_ranks = True
    opt_together = BoosterOptimizer(base_optimizer(together.parameters()), 5.0, 0.1)

    if saved_by == 2:
        train(together, opt_together, rank=rank, world=2, steps=STEPS // 2)
        dcp.save(state_of(together, opt_together), checkpoint_id=folder)
        opt_alone.lam, opt_alone.alpha = 1.0, 0.3
        load_into(alone, opt_alone, folder, no_dist=True)
        assert (opt_alone.lam, opt_alone.alpha) == (5.0, 0.1)
        train(alone, opt_alone, first=STEPS // 2)
        assert_same(alone, reference(False, None))
    else:
        train(alone, opt_alone, steps=STEPS // 2)
        if rank == 0:
            dcp.save(state_of(alone, opt_alone), checkpoint_id=folder, no_dist=True)
        dist.barrier()
        load_into(together, opt_together, folder, no_dist=False)
        train(together, opt_together, rank=rank, world=2, first=STEPS // 2)
        assert_same(together, reference(False, None))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


def checkpoint_of_the_bare_optimizer(rank: int) -> None:
    """It holds no λ and α: those in force stay."""
    model = fully_shard(Net(False))
    bare = base_optimizer(model.parameters())
    model(torch.ones((2, 4), dtype=torch.float64), True).square().mean().backward()
    bare.step()
    saved = get_optimizer_state_dict(model, bare)
    assert "booster_lam" not in saved["param_groups"][0]
    opt = BoosterOptimizer(base_optimizer(model.parameters()), 2.0, 0.4)
    set_optimizer_state_dict(model, opt, saved)
    assert (opt.lam, opt.alpha) == (2.0, 0.4)
    for p in model.parameters():
        assert torch.equal(full(opt.state[p]["exp_avg"]), full(bare.state[p]["exp_avg"]))


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
            TWO[f"ddp_{tag}_alignment_first"] = partial(case, alignment_first=True)
            TWO[f"ddp_{tag}_clip"] = partial(case, clip=0.5, alignment_parts=2)
for usage in ("staged", "one_call"):
    fsdp2 = partial(fsdp2_case, usage=usage)
    TWO |= {
        f"fsdp2_{usage}": fsdp2,
        f"fsdp2_{usage}_no_reshard": partial(fsdp2, reshard=False),
        f"fsdp2_{usage}_branches": partial(fsdp2, branches=True),
        f"fsdp2_{usage}_closures_zero": partial(fsdp2, zeroing=True),
        f"fsdp2_{usage}_micro_batches": partial(fsdp2, alignment_parts=2, harmful_parts=2),
        f"fsdp2_{usage}_held_back": partial(
            fsdp2, alignment_parts=2, harmful_parts=2, hold_back=True
        ),
        f"tensor_parallel_{usage}": partial(tensor_parallel_case, usage=usage),
        f"tensor_parallel_{usage}_micro_batches": partial(
            tensor_parallel_case, usage=usage, alignment_parts=2, harmful_parts=2
        ),
        f"tensor_parallel_{usage}_closures_zero": partial(
            tensor_parallel_case, usage=usage, zeroing=True
        ),
    }
TWO |= {
    "fsdp2_clip": partial(fsdp2_case, clip=0.5, alignment_parts=2),
    "fsdp2_refuses_a_local_first_pass": fsdp2_refuses_a_local_first_pass,
    "fsdp2_mixed_precision": fsdp2_mixed_precision,
    "checkpoint_2_to_1": partial(checkpoint_case, saved_by=2),
    "checkpoint_1_to_2": partial(checkpoint_case, saved_by=1),
    "checkpoint_of_the_bare_optimizer": checkpoint_of_the_bare_optimizer,
    **{
        f"fsdp1_{strategy.lower()}{'_original' if original else ''}": partial(
            fsdp1_case, original=original, strategy=strategy, parts=2 if original else 1
        )
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
        for original in (False, True)
    },
    **{
        f"ddp_refuses_a_local_first_pass_{view}_{zeroing}": partial(
            ddp_refuses_a_local_first_pass, bucket_view=view, zeroing=zeroing
        )
        for view in (False, True)
        for zeroing in (False, True)
    },
    **{
        f"one_collective_for_all_norms_{norm}": partial(one_collective_for_all_norms, norm=norm)
        for norm in ("global", "tensor")
    },
    "ddp_tensor_norm": partial(ddp_case, norm="tensor", ddp={"gradient_as_bucket_view": True}),
    "ddp_tensor_norm_two_reductions": partial(ddp_case, norm="tensor", local_second_pass=True),
    "ddp_accumulates": partial(ddp_case, accumulates=True),
    "ddp_accumulates_bucket_view": partial(
        ddp_case, accumulates=True, ddp={"gradient_as_bucket_view": True}
    ),
    "fsdp2_tensor_norm": partial(fsdp2_case, norm="tensor"),
    "fsdp2_tensor_norm_branches": partial(fsdp2_case, norm="tensor", branches=True),
    "fsdp1_tensor_norm": partial(
        fsdp1_case, norm="tensor", original=True, strategy="FULL_SHARD", parts=2
    ),
    "fsdp1_tensor_norm_flattened": partial(
        fsdp1_case, norm="tensor", original=False, strategy="FULL_SHARD"
    ),
    "tensor_parallel_tensor_norm": partial(tensor_parallel_case, norm="tensor"),
    **{
        f"ddp_perturbs_frozen_weights_{norm}": partial(ddp_perturbs_frozen_weights, norm=norm)
        for norm in ("global", "tensor")
    },
    "ddp_perturbs_experts": ddp_perturbs_experts,
    "ranks_of_their_own_judge_alone": ranks_of_their_own_judge_alone,
    "ddp_keeps_alpha_where_most_falls": partial(ddp_shortens_alpha_alike, bent=0.0, left=1.0),
    "ddp_shortens_alpha_where_most_rises": partial(ddp_shortens_alpha_alike, bent=20.0, left=0.5),
    "ddp_perturbs_beside_merged_weights": ddp_perturbs_beside_merged_weights,
    "ddp_refuses_a_bare_module_beside_frozen_weights": (
        ddp_refuses_a_bare_module_beside_frozen_weights
    ),
    "fsdp2_refuses_frozen_weights": fsdp2_refuses_frozen_weights,
    "ddp_no_sync_needs_accumulating_alignment": ddp_no_sync_needs_accumulating_alignment,
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs for NCCL")
def test_two_processes_on_gpus() -> None:
    outcomes = run_cases(TWO, 2, "nccl")
    failures = [f"{name}:\n{text}" for name, text in outcomes.items() if text is not None]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


FOUR: dict[str, Callable[[int], None]] = {
    f"fsdp2_times_tensor_parallel_{usage}_{parts}": partial(
        two_dimensions_case, usage=usage, alignment_parts=parts, harmful_parts=parts
    )
    for usage in ("staged", "one_call")
    for parts in (1, 2)
}
FOUR["fsdp2_times_tensor_parallel_tensor_norm"] = partial(two_dimensions_case, norm="tensor")


@pytest.fixture(scope="module")
def four() -> dict[str, str | None]:
    return run_cases(FOUR, 4)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, four: dict[str, str | None]) -> None:
    if four[name] is not None:
        pytest.fail(four[name], pytrace=False)  # type: ignore[arg-type]


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
