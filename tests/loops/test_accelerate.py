"""Accelerate's loop, in both orders of wrapping, against a plain loop over the formula."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LinearLR

from tests.multi_process import run_cases
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer
from torch_booster.integrations.accelerate import regularize
from torch_booster.integrations.accelerate import step as booster_step

LAM, ALPHA, EPS, CLIP, STEPS, BATCH = 5.0, 0.3, 1e-7, 0.5, 6, 8
ORDERS = ("prepare_booster", "booster_of_prepared")
Forward = Callable[[nn.Module, Tensor], Tensor]


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def make_base(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def make_scheduler(optimizer: torch.optim.Optimizer) -> LinearLR:
    return LinearLR(optimizer, 1.0, 0.2, 4 * STEPS)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(BATCH, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    return x.to(dtype), y.to(dtype)


def mse(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]).to(data[1].dtype), data[1])


# ---------------------------------------------------------------------------- the plain loop


def reference(
    accumulation: int,
    clip: bool = True,
    lam: float = LAM,
    *,
    eps: float = EPS,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    processes: int = 1,
    skipped: Sequence[int] = (),
) -> list[Tensor]:
    """Weights after STEPS steps on the global batches; the scheduler steps once a process."""
    model = make_model(dtype)
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    base = make_base(params)
    scheduler = make_scheduler(base)

    def at(weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            # One context a forward pass, as Accelerate makes it: its cache ends with it.
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return functional_call(model, dict(zip(names, weights, strict=True)), (x,))

        return forward

    for step in range(STEPS):
        micro = [batch(100 * step + i, dtype) for i in range(accumulation)]
        harmful = batch(100 * step + 99, dtype)
        grads = booster_gradient(
            lambda w, micro=micro: torch.stack([mse(at(w), data) for data in micro]).mean(),
            lambda w, harmful=harmful: mse(at(w), harmful),
            params,
            lam,
            ALPHA,
            eps,
        )
        if step in skipped:
            continue
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if clip:
            nn.utils.clip_grad_norm_(params, CLIP)
        base.step()
        for _ in range(processes):
            scheduler.step()
    return [p.detach() for p in params]


# ------------------------------------------------------------------------ Accelerate's loop


class Run:
    """Model, optimizer and scheduler in Accelerate's hands, in one of the two orders."""

    def __init__(
        self,
        accelerator: Accelerator,
        order: str,
        lam: float = LAM,
        *,
        eps: float = EPS,
        dtype: torch.dtype = torch.float64,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        trust_region: bool = False,
    ) -> None:
        more: dict[str, Any] = {"eps": eps, "trust_region": trust_region, "self_check": False}
        self.accelerator = accelerator
        self.around = around
        self.dtype = dtype
        model = make_model(dtype)
        base = make_base(model.parameters())
        if order == "prepare_booster":
            self.booster = BoosterOptimizer(base, lam, ALPHA, **more)
            self.model, self.optimizer, self.scheduler = accelerator.prepare(
                model, self.booster, make_scheduler(self.booster)
            )
        else:
            self.model, base = accelerator.prepare(model, base)
            self.optimizer = self.booster = BoosterOptimizer(base, lam, ALPHA, **more)
            self.scheduler = accelerator.prepare(make_scheduler(self.booster))

    def own(self, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return data[0][rank::ranks], data[1][rank::ranks]

    def closure(self, seed: int, log: list[int] | None = None) -> Callable[[], Tensor]:
        data = self.own(batch(seed, self.dtype))

        def closure() -> Tensor:
            loss = mse(self.model, data)
            self.accelerator.backward(loss)
            if log is not None:
                log.append(seed)
            return loss

        return closure

    def steps(
        self, first: int = 0, last: int = STEPS, *, clip: bool = True, one_call: bool = False
    ) -> list[int]:
        """Runs the loop and returns the seeds of the harmful closures that ran."""
        ran: list[int] = []
        for step in range(first, last):
            for micro in range(self.accelerator.gradient_accumulation_steps):
                with self.accelerator.accumulate(self.model):
                    harmful = self.closure(100 * step + 99, ran)
                    alignment = self.closure(100 * step + micro)
                    if one_call:
                        booster_step(self.optimizer, alignment, harmful)
                    else:
                        with self.around():
                            regularize(self.optimizer, harmful)
                            alignment()
                        if clip and self.accelerator.sync_gradients:
                            self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                        self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return ran

    def params(self) -> list[Tensor]:
        params = [p.detach() for p in self.model.parameters()]
        return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params]


def assert_close(actual: list[Tensor], expected: list[Tensor], atol: float = 1e-12) -> None:
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    reset()
    yield
    reset()


# ---------------------------------------------------------------------------- one process


@pytest.mark.parametrize("one_call", [False, True], ids=["staged", "one_call"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_trajectory_equals_the_plain_loop(order: str, accumulation: int, one_call: bool) -> None:
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=accumulation), order)
    ran = run.steps(one_call=one_call)
    assert_close(run.params(), reference(accumulation, clip=not one_call))
    # Once a step and twice a time, whatever the number of micro-batches.
    assert ran == [100 * step + 99 for step in range(STEPS) for _ in range(2)]


def test_the_reference_depends_on_lambda_and_on_its_division() -> None:
    exact = reference(4)
    for other in (0.0, LAM / 4):
        wrong = reference(4, lam=other)
        assert max(float((p - q).abs().max()) for p, q in zip(exact, wrong, strict=True)) > 1e-4


@pytest.mark.parametrize("order", ORDERS)
def test_the_optimizers_own_methods_name_the_integration(order: str) -> None:
    """Within the core nobody knows that λ would be divided; so they refuse."""
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), order)
    for call in (
        lambda: run.booster.regularize(never),
        lambda: run.booster.step(never, never),
        lambda: run.booster.backward(never, never),
    ):
        with pytest.raises(RuntimeError, match=r"regularize\(optimizer.*integrations\.accelerate"):
            call()


def test_a_harmful_closure_that_raises_leaves_the_accumulation_as_it_was() -> None:
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), ORDERS[0])

    def failing() -> Tensor:
        raise ZeroDivisionError

    run.accelerator.sync_gradients = True
    with pytest.raises(ZeroDivisionError):
        regularize(run.optimizer, failing)
    assert run.accelerator.gradient_accumulation_steps == 2


def test_the_loss_of_the_one_call_is_the_alignment_loss() -> None:
    for order in ORDERS:
        run = Run(Accelerator(cpu=True), order)
        expected = mse(run.model, batch(0)).item()
        assert booster_step(run.optimizer, run.closure(0), run.closure(99)).item() == expected
        reset()


@pytest.mark.parametrize("order", ORDERS)
def test_a_closure_that_zeroes_gradients_keeps_the_regularizer(order: str) -> None:
    run = Run(Accelerator(cpu=True), order)

    def zeroing(seed: int) -> Callable[[], Tensor]:
        closure = run.closure(seed)

        def zero_first() -> Tensor:
            run.optimizer.zero_grad()
            return closure()

        return zero_first

    for at in range(STEPS):
        booster_step(run.optimizer, zeroing(100 * at), zeroing(100 * at + 99))
        run.scheduler.step()
    assert_close(run.params(), reference(1, clip=False))


# ------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("around", [False, True], ids=["in_forward", "around_both"])
@pytest.mark.parametrize("order", ORDERS)
def test_bf16_autocast_equals_the_plain_loop(order: str, around: bool) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    outer = (lambda: accelerator.autocast()) if around else nullcontext
    run = Run(accelerator, order, dtype=torch.float32, around=outer)
    run.steps()
    expected = reference(2, dtype=torch.float32, autocast=True)
    off = reference(2, lam=0.0, dtype=torch.float32, autocast=True)
    assert_close(run.params(), expected, atol=2e-6)
    assert max(float((p - q).abs().max()) for p, q in zip(expected, off, strict=True)) > 1e-3


def fp16_accelerator(accumulation: int) -> Accelerator:
    """Accelerate allows fp16 on GPUs only; everything it does about the scaler runs here too.

    ε is added to the norm of the scaled gradient, so the runs compared have ε = 0.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return accelerator


def enter_fp16(accelerator: Accelerator) -> None:
    # After prepare, which would put the model under autocast: clip_grad_norm_ asks this.
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"


@pytest.mark.parametrize("one_call", [False, True], ids=["staged", "one_call"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_scaled_gradients_equal_the_plain_loop(
    order: str, accumulation: int, one_call: bool
) -> None:
    run = Run(fp16_accelerator(accumulation), order, eps=0.0)
    enter_fp16(run.accelerator)
    run.steps(one_call=one_call)
    assert_close(run.params(), reference(accumulation, clip=not one_call, eps=0.0))


@pytest.mark.parametrize("one_call", [False, True], ids=["staged", "one_call"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_trust_region_knows_the_scale(order: str, one_call: bool) -> None:
    run = Run(fp16_accelerator(1), order, eps=0.0, trust_region=True)
    enter_fp16(run.accelerator)
    run.steps(one_call=one_call)
    assert_close(run.params(), reference(1, clip=not one_call, eps=0.0))
    assert run.optimizer.param_groups[0]["booster_trust_region"] == 1.0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_overflow_in_a_harmful_pass_skips_the_step(order: str, accumulation: int) -> None:
    run = Run(fp16_accelerator(accumulation), order, eps=0.0)
    enter_fp16(run.accelerator)
    prepared = run.accelerator._optimizers[0]
    closure = run.closure

    def overflowing(seed: int, log: list[int] | None = None) -> Callable[[], Tensor]:
        def overflow() -> Tensor:
            loss = mse(run.model, batch(seed)) * torch.tensor(torch.inf)
            run.accelerator.backward(loss)
            return loss.detach()

        return overflow if seed == 299 else closure(seed, log)

    run.closure = overflowing
    run.steps(0, 2)
    before = [p.clone() for p in run.params()]
    rate = run.optimizer.param_groups[0]["lr"]
    run.steps(2, 3)
    assert_close(run.params(), before, atol=0)
    assert prepared.step_was_skipped
    assert run.accelerator.scaler.get_scale() == 2.0**9
    assert run.optimizer.param_groups[0]["lr"] == rate
    run.steps(3)
    assert_close(run.params(), reference(accumulation, eps=0.0, skipped=[2]))


# ------------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("order", ORDERS)
def test_a_loaded_run_continues_bit_for_bit(order: str, tmp_path: Path) -> None:
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), order)
    run.steps(0, 3)
    run.accelerator.save_state(str(tmp_path))
    run.steps(3)
    expected, rate = run.params(), run.scheduler.get_last_lr()

    reset()
    other = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), order, lam=0.5)
    other.steps(0, 1)
    other.booster.alpha = 7.0
    other.accelerator.load_state(str(tmp_path))
    assert (other.booster.lam, other.booster.alpha) == (LAM, ALPHA)
    assert len(other.booster.state_dict()["state"]) == len(expected)
    other.steps(3)
    assert_close(other.params(), expected, atol=0)
    assert other.scheduler.get_last_lr() == rate


# ------------------------------------------------------------------------ what is refused


def never() -> Tensor:
    raise AssertionError("the closure ran")


def ways(run: Run) -> dict[str, Callable[[], Any]]:
    return {
        "regularize": lambda: regularize(run.optimizer, never),
        "one_call": lambda: booster_step(run.optimizer, never, never),
    }


@pytest.mark.parametrize("way", ["regularize", "one_call"])
@pytest.mark.parametrize("order", ORDERS)
def test_deepspeed_is_refused_before_a_closure_runs(
    order: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Accelerator(cpu=True), order)
    monkeypatch.setitem(
        AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED
    )
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*AcceleratedEngine"):
        ways(run)[way]()


@pytest.mark.parametrize("way", ["regularize", "one_call"])
@pytest.mark.parametrize("order", ORDERS)
def test_fsdp_must_reduce_each_micro_batch(
    order: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), order)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(RuntimeError, match="sync_each_batch=True"):
        ways(run)[way]()


def test_off_the_boundary_nothing_harmful_runs() -> None:
    for order in ORDERS:
        run = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), order)
        before = run.params()
        with run.accelerator.accumulate(run.model):
            assert regularize(run.optimizer, never) is None
            booster_step(run.optimizer, run.closure(0), never)
        assert_close(run.params(), before, atol=0)
        assert all(p.grad is not None for p in run.model.parameters())
        reset()


def test_bad_closures_name_themselves() -> None:
    run = Run(Accelerator(cpu=True), ORDERS[0])
    with pytest.raises(TypeError, match="missing harmful_closure"):
        booster_step(run.optimizer, run.closure(0), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alignment_closure must be callable"):
        booster_step(run.optimizer, 3.0, run.closure(0))  # type: ignore[arg-type]


def test_other_prepared_optimizers_step_as_before() -> None:
    Run(Accelerator(cpu=True), ORDERS[0])
    model = make_model()
    optimizer = AcceleratedOptimizer(make_base(model.parameters()))
    with pytest.raises(TypeError, match="positional argument"):
        optimizer.step(never, never)
    with pytest.raises(TypeError, match="There is no BoosterOptimizer"):
        regularize(optimizer, never)
    calls: list[str] = []
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["closure"]


def test_preparing_twice_is_refused() -> None:
    run = Run(Accelerator(cpu=True), ORDERS[1])
    with pytest.raises(TypeError, match="prepared already"):
        run.accelerator.prepare(run.booster)


# ---------------------------------------------------------------------------- two processes


def accelerator_on(rank: int, **options: Any) -> Accelerator:
    reset()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
    }
    accelerator = Accelerator(cpu=True, **options)
    assert accelerator.num_processes == dist.get_world_size()
    return accelerator


def ddp_case(rank: int, order: str, accumulation: int, one_call: bool) -> None:
    accelerator = accelerator_on(rank, gradient_accumulation_steps=accumulation)
    run = Run(accelerator, order)
    assert isinstance(run.model, nn.parallel.DistributedDataParallel)
    run.steps(one_call=one_call)
    assert_close(run.params(), reference(accumulation, clip=not one_call, processes=2))


def sync_each_batch_case(rank: int, order: str) -> None:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    run = Run(accelerator_on(rank, gradient_accumulation_plugin=plugin), order)
    run.steps()
    assert_close(run.params(), reference(2, processes=2))


def no_sync_case(rank: int, zeroing: bool) -> None:
    accelerator = accelerator_on(rank, gradient_accumulation_steps=2)
    run = Run(accelerator, ORDERS[0])
    before = [p.clone() for p in run.params()]
    closure = run.closure(99)

    def harmful() -> Tensor:
        if zeroing:
            run.model.zero_grad()
        return closure()

    with accelerator.accumulate(run.model):
        with pytest.raises(RuntimeError, match=r"integrations\.accelerate"):
            run.booster.regularize(harmful)
        assert regularize(run.optimizer, harmful) is None
    assert all(p.grad is None for p in run.model.parameters())
    assert_close(run.params(), before, atol=0)


def checkpoint_case(rank: int, order: str) -> None:
    folder: list[str] = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    run = Run(accelerator_on(rank, gradient_accumulation_steps=2), order)
    run.steps(0, 3)
    run.accelerator.save_state(folder[0])
    other = Run(accelerator_on(rank, gradient_accumulation_steps=2), order, lam=0.5)
    other.accelerator.load_state(folder[0])
    assert other.booster.lam == LAM
    other.steps(3)
    assert_close(other.params(), reference(2, processes=2))


def fsdp2_case(rank: int, order: str, accumulation: int, one_call: bool) -> None:
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_each_batch=True)
    accelerator = accelerator_on(rank, gradient_accumulation_plugin=plugin)
    # Accelerate selects FSDP on accelerators only; all it does to model and optimizer is the same.
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap"
    )
    run = Run(accelerator, order)
    assert all(hasattr(p, "full_tensor") for p in run.model.parameters())
    run.steps(one_call=one_call)
    assert_close(run.params(), reference(accumulation, clip=not one_call, processes=2))


CASES: dict[str, Callable[[int], None]] = {
    **{
        f"ddp-{order}-{accumulation}-{'one_call' if one_call else 'staged'}": partial(
            ddp_case, order=order, accumulation=accumulation, one_call=one_call
        )
        for order in ORDERS
        for accumulation in (1, 2, 4)
        for one_call in (False, True)
    },
    **{f"sync_each_batch-{order}": partial(sync_each_batch_case, order=order) for order in ORDERS},
    **{f"no_sync-{z}": partial(no_sync_case, zeroing=z) for z in (False, True)},
    **{f"checkpoint-{order}": partial(checkpoint_case, order=order) for order in ORDERS},
    **{
        f"fsdp2-{order}-{accumulation}-{'one_call' if one_call else 'staged'}": partial(
            fsdp2_case, order=order, accumulation=accumulation, one_call=one_call
        )
        for order in ORDERS
        for accumulation in (1, 2)
        for one_call in (False, True)
    },
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    return run_cases(CASES, 2)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_the_plain_loop(outcomes: dict[str, str | None], case: str) -> None:
    assert outcomes[case] is None, outcomes[case]
