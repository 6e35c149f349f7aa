"""Under a DeepSpeed engine on two processes a run equals the formula on one process."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deepspeed.runs import (
    ALPHA,
    WORLD,
    Run,
    batch,
    booster_on,
    difference,
    harmful_closure,
    launch,
    loss_on,
    noise,
    oracle,
    steps,
    train,
    values,
)
from tests.multi_process import run_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: make test-deepspeed",
)

STAGES = (0, 1, 2, 3)
SMALL_BUCKETS = {"reduce_bucket_size": 60, "allgather_bucket_size": 60, "overlap_comm": True}


def exact() -> Iterator[tuple[str, Run]]:
    """Every run that has to equal the formula."""
    for stage in STAGES:
        run = Run(stage=stage)
        yield f"{stage}", run
        yield f"{stage}-clipped", replace(run, clip=1.0)
        yield f"{stage}-accumulated", replace(run, accumulation=2)
        yield f"{stage}-accumulated-clipped", replace(run, accumulation=2, clip=1.0)
        yield f"{stage}-groups", replace(run, accumulation=2, groups=True)
        yield f"{stage}-groups-tensor", replace(run, groups=True, norm="tensor")
        yield f"{stage}-adapter-warmup", replace(run, adapter=True, warmup=4, clip=1.0)
        yield f"{stage}-checkpointing", replace(run, blocks=True)
        if stage:
            run = replace(run, offload=True, clip=1.0)
            yield f"{stage}-offload", run
            many = replace(run, accumulation=2, groups=True, norm="tensor")
            yield f"{stage}-offload-groups-tensor", many
    both = Run(accumulation=2, clip=1.0, groups=True)
    yield "1-buckets", replace(both, stage=1, zero=SMALL_BUCKETS)
    yield "2-buckets", replace(both, stage=2, zero=SMALL_BUCKETS)
    turns = {"round_robin_gradients": True, "contiguous_gradients": False}
    yield "2-round-robin", replace(both, stage=2, zero=turns)
    parts = {"sub_group_size": 60, "reduce_bucket_size": 60}
    yield "3-sub-groups", replace(both, stage=3, zero=parts)
    yield "3-sub-groups-offload", replace(both, stage=3, zero=parts, offload=True)
    yield "3-none-resident", replace(both, stage=3, zero={"stage3_param_persistence_threshold": 0})


def equals_the_formula(name: str, run: Run, rank: int) -> None:
    found = train(run, rank)
    if rank == 0:
        expected = oracle(run)
        off, own, effect = (
            difference(found, expected),
            noise(run),
            difference(oracle(run, booster=False), expected),
        )
        print(f"deepspeed {name}: off {off:.2e}, noise {own:.2e}, effect {effect:.1e}")
        assert off <= 2 * own, f"{off} off, where float32 alone is {own}"
        assert effect > 1e4 * off


def low_precision() -> Iterator[tuple[str, Run]]:
    wide = {"data_types": {"grad_accum_dtype": "fp32"}}
    for dtype in ("bfloat16", "float16"):
        for stage in STAGES[dtype == "float16" :]:
            run = Run(stage=stage, accumulation=2, clip=1.0, dtype=dtype)
            yield f"{dtype}-{stage}", run
            if stage:
                yield f"{dtype}-{stage}-wide", replace(run, more=wide)
                yield f"{dtype}-{stage}-offload", replace(run, offload=True)


def follows_the_formula(name: str, run: Run, rank: int) -> None:
    """What rounding leaves of the difference that Booster makes: measured 30 % and 1 %."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rounding to")
        found = train(run, rank)
    if rank == 0:
        expected = oracle(run)
        off, effect = difference(found, expected), difference(oracle(run, booster=False), expected)
        print(f"deepspeed {name}: off {off:.2e}, effect {effect:.1e}")
        assert off <= (0.4 if run.dtype == "bfloat16" else 0.02) * effect


def passes_leave_nothing_behind(stage: int, offload: bool, rank: int) -> None:
    """λ = 0, and a λ of which float32 leaves 0 but whose passes are run, are plain DeepSpeed."""
    run = Run(stage=stage, accumulation=2, clip=1.0, groups=False, offload=offload)
    bare = train(run, rank, booster=False)
    for lam in (0.0, 1e-60):
        found = train(replace(run, lam=lam), rank)
        assert all(torch.equal(found[n], bare[n]) for n in bare), f"λ = {lam}"


def a_checkpoint_goes_on(stage: int, folder: str, rank: int) -> None:
    run = Run(stage=stage, accumulation=2, clip=1.0, groups=True, warmup=5)
    unbroken = train(run, rank)
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    for _ in steps(run, engine, booster, rank, range(3)):
        pass
    engine.save_checkpoint(folder, tag=f"{stage}")
    engine.destroy()
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    engine.load_checkpoint(folder, tag=f"{stage}")
    assert booster.step_count == 3
    assert [g["booster_lam"] for g in booster.param_groups] == [2.0, 5.0]
    for _ in steps(run, engine, booster, rank, range(3, run.steps)):
        pass
    assert booster.step_count == run.steps
    found = values(engine)
    engine.destroy()
    assert all(torch.equal(found[n], unbroken[n]) for n in unbroken)


def diagnostics_are_of_the_whole_batch(stage: int, rank: int) -> None:
    run = Run(stage=stage)
    model = run.net().double()
    x, y = batch(0, 0, True)
    h = nn.functional.mse_loss(model(x, True), y)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(h, params, allow_unused=True)
    norm = sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    returned = booster.regularize(harmful_closure(engine, rank, 0))
    read = booster.read_diagnostics()
    assert returned.item() == read["harmful_loss"] == pytest.approx(h.item(), rel=1e-5)
    assert read["harmful_grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert read["perturbation_norm"] == pytest.approx(ALPHA, rel=1e-5)
    assert read["harmful_loss_drop"] > 0
    assert 0.8 < read["drop_ratio"] < 1.2
    engine.destroy()


def alpha_is_halved_where_the_step_is_too_long(stage: int, rank: int) -> None:
    run = Run(stage=stage, alpha=100.0)
    engine = launch(run, rank)
    booster = booster_on(run, engine, trust_region=True)
    lengths = []
    for _ in steps(run, engine, booster, rank, range(2)):
        lengths.append(booster.read_diagnostics()["perturbation_norm"])
    assert lengths == pytest.approx([100.0, 50.0], rel=1e-4)
    assert {group["booster_trust_region"] for group in booster.param_groups} == {0.25}
    engine.destroy()


def what_pads_a_partition_is_no_weight(rank: int) -> None:
    """It is whatever was in memory."""
    run = Run(stage=3)
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    shards, flats = booster._shards, engine.optimizer.fp32_partitioned_groups_flat
    kept = [m.clone() for m in shards.masters()]
    for flat in flats:
        flat.detach().fill_(torch.nan)
    for m, value in zip(shards.masters(), kept, strict=True):
        m.copy_(value)
    assert shards.any_rank(any(flat.isnan().any() for flat in flats))
    booster.regularize(harmful_closure(engine, rank, 0))
    assert booster.read_diagnostics()["perturbation_norm"] == pytest.approx(ALPHA, rel=1e-5)
    engine.destroy()


def randomness_and_buffers_are_replayed(stage: int, rank: int) -> None:
    """With α = 0 both passes are one, dropout and all, so that nothing is left to add."""
    run = Run(stage=stage, dropout=0.5, alpha=0.0)
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    for step in range(2):
        booster.regularize(harmful_closure(engine, rank, step))
        assert all(not x.any() for x in booster._waiting)
        assert booster.read_diagnostics()["harmful_loss_drop"] == 0
        assert engine.module.seen.item() == step  # alignment passes
        engine.backward(loss_on(engine, rank, step, 0, False))
        booster.step()
    other = booster_on(run, engine, replay_rng=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.regularize(harmful_closure(engine, rank, 2))
    assert any(x.any() for x in other._waiting)
    engine.destroy()


def an_exception_leaves_the_weights(stage: int, rank: int) -> None:
    run = Run(stage=stage)
    engine = launch(run, rank)
    booster = booster_on(run, engine, self_check=False)
    before, calls = values(engine), []

    def closure() -> Tensor:
        calls.append(0)
        if len(calls) == 2:  # at w′
            assert any(not torch.equal(x, before[n]) for n, x in values(engine).items())
            raise KeyError("the second pass")
        return harmful_closure(engine, rank, 0)()

    with pytest.raises(KeyError):
        booster.regularize(closure)
    assert all(torch.equal(x, before[n]) for n, x in values(engine).items())
    for _ in steps(run, engine, booster, rank, range(run.steps)):
        pass
    found = values(engine)
    engine.destroy()
    if rank == 0:
        assert difference(found, oracle(run)) <= 2 * noise(run)


def an_overflow_skips_the_step(stage: int, offload: bool, rank: int) -> None:
    more = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    run = Run(stage=stage, dtype="float16", steps=14, offload=offload, more=more)
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    before = values(engine)
    for step in steps(run, engine, booster, rank, range(run.steps)):
        if engine.skipped_steps == step + 1:
            assert all(torch.equal(x, before[n]) for n, x in values(engine).items())
    assert 0 < engine.skipped_steps < run.steps
    assert booster.step_count == run.steps - engine.skipped_steps
    assert booster._now.checked
    assert all(x.isfinite().all() for x in values(engine).values())
    engine.destroy()


def the_self_check_sees(fault: str, stage: int, rank: int) -> None:
    engine = launch(Run(stage=stage), rank)
    booster = booster_on(Run(stage=stage), engine)
    shards = booster._shards
    if fault == "forward":  # masters that never arrive
        shards.push, text = lambda: None, "forward weights"
    elif fault == "left":  # gradients that the next pass is added to
        kept: list[Any] = []

        def gradients() -> list[Tensor]:
            now = [x.clone() for x in type(shards).gradients(shards)]
            kept.append(now)
            return [sum(xs[1:], xs[0]) for xs in zip(*kept, strict=True)]

        shards.gradients, text = gradients, "leaves no gradients"
    else:  # lengths of this rank's pieces alone
        shards.sharded, text = False, "move by alpha"
        whole = type(shards).tensor_norms

        def once(pieces: list[Tensor]) -> Tensor:
            shards.sharded = bool(shards.seen)
            shards.seen += 1
            return whole(shards, pieces)

        shards.seen, shards.tensor_norms = 0, once
    with pytest.raises(RuntimeError, match=text):
        booster.regularize(harmful_closure(engine, rank, 0))
    engine.destroy()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4000), nn.Linear(4000, 3)
        self.middle = nn.Linear(3, 100_000)

    def forward(self, x: Tensor, _: bool) -> Tensor:
        y = self.outer(torch.tanh(self.inner(x)))
        return y + self.middle(y).mean(-1, keepdim=True)


def memory_is_two_shards(stage: int, rank: int) -> None:
    class Big(Run):
        def net(self) -> Any:
            return Wide()

    run = Big(stage=stage)
    engine = launch(run, rank)
    booster = booster_on(run, engine, self_check=False)
    shard = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    shard = shard if stage == 0 else shard / WORLD
    held: list[float] = []

    def closure() -> Tensor:
        held.append(live_bytes())
        return harmful_closure(engine, rank, 0)()

    for step in range(2):  # the first one makes what the engine keeps
        held.clear()
        before = live_bytes()
        booster.regularize(closure)
        waiting = live_bytes()
        engine.backward(loss_on(engine, rank, step, 0, False))
        booster.step()
    most, least = (held[1] - before) / shard, (waiting - before) / shard
    if rank == 0:
        print(f"deepspeed memory {stage}: {most:.3f} shards in the passes, {least:.3f} after")
    assert most <= 2.05
    assert least <= 1.05
    engine.destroy()


def live_bytes() -> float:
    gc.collect()
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in gc.get_objects():
            if isinstance(x, Tensor) and x.layout is torch.strided:
                try:
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                except (NotImplementedError, RuntimeError):
                    continue  # fake tensors
    return sum(storages.values())


def misuse_is_refused(stage: int, rank: int) -> None:
    run = Run(stage=stage, accumulation=2)
    engine = launch(run, rank)
    booster = booster_on(run, engine)
    h = harmful_closure(engine, rank, 0)

    def twice() -> Tensor:
        h()
        return h()

    def stepping() -> Tensor:
        loss = h()
        engine.step()
        return loss

    before = values(engine)
    with pytest.raises(RuntimeError, match="towards harm"):
        booster.regularize(stepping)
    assert all(torch.equal(x, before[n]) for n, x in values(engine).items())
    with pytest.raises(RuntimeError, match="several times"):
        booster.regularize(twice)
    with pytest.raises(RuntimeError, match="made no gradients"):
        booster.regularize(lambda: torch.ones(()))
    with pytest.raises(TypeError, match="must return its loss"):
        booster.regularize(lambda: h() and None)
    with pytest.raises(TypeError, match="callable"):
        booster.regularize(1.0)
    assert not {"backward", "step"} & vars(engine).keys()
    assert engine._is_gradient_accumulation_boundary is None
    engine.backward(loss_on(engine, rank, 0, 0, False))
    booster.step()
    with pytest.raises(RuntimeError, match="before the first micro-batch"):
        booster.regularize(h)
    engine.backward(loss_on(engine, rank, 0, 1, False))
    with pytest.warns(UserWarning, match="This step had no regulariser"):
        booster.step()
    assert booster.regularize(h) is not None
    assert booster.regularize(h) is None  # on a later micro-batch
    for micro in range(2):
        engine.backward(loss_on(engine, rank, 0, micro, False))
        engine.step()
    with pytest.raises(RuntimeError, match="in its place"):
        booster.step() if engine.is_gradient_accumulation_boundary() else booster.regularize(h)
    engine.destroy()


def features_are_refused(rank: int) -> None:
    import deepspeed

    from torch_booster.integrations.deepspeed import BoosterEngine

    run = Run(stage=3)
    more: dict[str, Any] = {"offload_param": {"device": "cpu", "pin_memory": False}}
    with pytest.raises(RuntimeError, match="offload_param"):
        booster_on(run, launch(replace(run, zero=more), rank))
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    with pytest.raises(RuntimeError, match="torch_autocast"):
        booster_on(run, launch(replace(run, more=autocast), rank))
    engine = launch(run, rank)
    for name, value, text in (
        ("has_moe_layers", True, "experts"),
        ("mpu", object(), "Model parallelism"),
        ("sequence_parallel_size", 2, "Sequence"),
        ("zenflow", True, "ZenFlow"),
        ("super_offload", lambda: True, "SuperOffload"),
        ("zero_hpz_partition_size", lambda: 2, "hpZ"),
        ("zero_quantized_weights", lambda: True, "Quantised weights"),
        ("zero_quantized_gradients", lambda: True, "Quantised gradients"),
        ("is_deepcompile_enabled", lambda: True, "DeepCompile"),
        ("managed_gradient_accumulation", lambda: False, "managed_gradient_accumulation"),
        ("fp16_master_weights_and_gradients", lambda: True, "Masters in 16"),
    ):
        kept = vars(engine).get(name)
        setattr(engine, name, value)
        with pytest.raises(RuntimeError, match=text):
            BoosterEngine(engine)
        delattr(engine, name) if kept is None and callable(value) else setattr(engine, name, kept)
    booster = BoosterEngine(engine)
    assert (booster.lam, booster.alpha) == (5.0, 0.1)
    for bad in ({"lam": -1.0}, {"norm": "layer"}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BoosterEngine(engine, **bad)
    version, deepspeed.__version__ = deepspeed.__version__, "0.18.9"
    with pytest.raises(RuntimeError, match=r"0\.18\.9.*deepspeed>=0\.19\.8,<0\.20"):
        BoosterEngine(engine)
    deepspeed.__version__ = version

    class Other(type(engine.optimizer)):
        pass

    engine.optimizer.__class__ = Other
    with pytest.raises(TypeError, match="no adapter"):
        BoosterEngine(engine)
    with pytest.raises(TypeError, match="Linear"):
        BoosterEngine(nn.Linear(2, 2))
    engine.optimizer.__class__ = Other.__bases__[0]
    engine.destroy()


def cases(folder: str) -> dict[str, Callable[[int], None]]:
    made: dict[str, Callable[[int], None]] = {}
    for name, run in exact():
        made[f"exact-{name}"] = partial(equals_the_formula, name, run)
    for name, run in low_precision():
        made[name] = partial(follows_the_formula, name, run)
    for stage in STAGES:
        made[f"plain-{stage}"] = partial(passes_leave_nothing_behind, stage, False)
        made[f"checkpoint-{stage}"] = partial(a_checkpoint_goes_on, stage, folder)
        made[f"diagnostics-{stage}"] = partial(diagnostics_are_of_the_whole_batch, stage)
        made[f"shorter-{stage}"] = partial(alpha_is_halved_where_the_step_is_too_long, stage)
        made[f"replayed-{stage}"] = partial(randomness_and_buffers_are_replayed, stage)
        made[f"exception-{stage}"] = partial(an_exception_leaves_the_weights, stage)
        made[f"memory-{stage}"] = partial(memory_is_two_shards, stage)
        made[f"misuse-{stage}"] = partial(misuse_is_refused, stage)
        if stage:
            made[f"plain-{stage}-offload"] = partial(passes_leave_nothing_behind, stage, True)
            made[f"overflow-{stage}"] = partial(an_overflow_skips_the_step, stage, False)
            made[f"overflow-{stage}-offload"] = partial(an_overflow_skips_the_step, stage, True)
            for fault in ("forward", "left", "norm"):
                made[f"check-{fault}-{stage}"] = partial(the_self_check_sees, fault, stage)
    made["padding"] = what_pads_a_partition_is_no_weight
    made["refused"] = features_are_refused
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """All of them in one set of processes, whose start takes longer than they do."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    return run_cases(cases(str(folder)), WORLD)


@pytest.mark.parametrize("name", list(cases(tempfile.gettempdir())))
def test_two_processes(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
