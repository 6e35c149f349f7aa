"""The contract of a step, looked at on the device: each check is a function of it.

A check raises where the contract is broken and returns the numbers that it has seen. On the CPU the
same code runs; what only an accelerator can answer is then skipped with the reason.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.formula import Loss, total, wanted, wide
from benchmarks.gpu.jobs import Job, Keep, Record, Skipped
from benchmarks.live_memory import peak_bytes
from torch_booster import BoosterOptimizer

__all__ = ["CHECKS", "jobs"]

LAM, ALPHA = 5.0, 0.5
NORMS = ("global", "tensor")
Closure = Callable[[], Tensor]

# Of `Wanted.missed_by`, where 1 is a missing regulariser. In half precision a weight at the edge of
# rounding may go the other way.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}


# ------------------------------------------------------------------------------------- trainings


class Net(nn.Module):
    """Two layers with a norm and, where asked, dropout between; they may be on two devices."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 64)
        self.norm = nn.LayerNorm(64)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16) to (batch, 8)."""
        hidden = torch.tanh(_where(self.inner, x))
        return _where(self.outer, self.dropout(_where(self.norm, hidden)))


def _where(layer: nn.Module, x: Tensor) -> Tensor:
    """Through a layer, on its device."""
    return layer(x.to(next(layer.parameters()).device))


class Training:
    """A model and two losses on one batch each, the same numbers on every device."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype = torch.float32,
        cast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        dropout: float = 0.0,
    ) -> None:
        torch.manual_seed(0)
        self.model: Any = Net(dropout).to(device, dtype)
        drawn = torch.randn(2, 32, 16), torch.randn(2, 32, 8)
        self._x, self._y = (values.to(device, dtype) for values in drawn)
        self._cast = cast

    def loss(self, which: int, rows: slice = slice(None)) -> Loss:
        """The alignment loss (0) or the harmful one (1)."""
        x, y = self._x[which, rows], self._y[which, rows]

        def of(call: Callable[..., Any]) -> Tensor:
            with self._cast():
                made = call(x)
                return nn.functional.mse_loss(made, y.to(made))

        return of

    def closure(self, which: int, call: Any = None, rows: slice = slice(None)) -> Closure:
        """Forward and backward of it, through the model or through what wraps it."""
        loss_of = self.loss(which, rows)

        def forward_and_backward() -> Tensor:
            loss = loss_of(self.model if call is None else call)
            loss.backward()
            return loss

        return forward_and_backward

    def gradients(self) -> dict[str, Tensor | None]:
        """What is in `.grad`."""
        return {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def fused(params: Sequence[Tensor], **options: Any) -> Optimizer:
    """AdamW in one kernel."""
    return AdamW(params, lr=1e-3, fused=True, **options)


def follow(
    training: Training,
    norm: str,
    f: Closure | None = None,
    h: Closure | None = None,
    losses: tuple[Loss, Loss] | None = None,
    steps: int = 3,
    **options: Any,
) -> float:
    """Takes some steps, each held against the formula, and returns the largest `missed_by`."""
    f, h = f or training.closure(0), h or training.closure(1)
    alignment, harmful = losses or (training.loss(0), training.loss(1))
    params = [p for p in training.model.parameters() if p.requires_grad]
    optimizer = BoosterOptimizer(fused(params), LAM, ALPHA, norm=norm, **options)
    worst = 0.0
    for step in range(steps):
        aim = wanted(training.model, alignment, harmful, LAM, ALPHA, norm)
        before = training.weights()
        optimizer.zero_grad()
        if step % 2:
            optimizer.backward(f, h)
        else:
            optimizer.regularize(h)
            expect_same(training, before)
            f()
        expect_same(training, before)
        worst = max(worst, aim.missed_by(training.gradients()))
        optimizer.step()
    return worst


def expect_same(training: Training, before: dict[str, Tensor]) -> None:
    """Weights have come back bit for bit."""
    for name, p in training.model.named_parameters():
        if not torch.equal(p, before[name]):
            raise AssertionError(f"the weights {name} have not come back bit for bit")


def at_most(what: str, value: float, bound: float) -> float:
    """The value, which must not be larger."""
    if not value <= bound:  # NaN is refused too
        raise AssertionError(f"{what} is {value:.3g}, expected at most {bound:g}")
    return value


def at_least(what: str, value: float, bound: float) -> float:
    """The value, which must not be smaller."""
    if not value >= bound:
        raise AssertionError(f"{what} is {value:.3g}, expected at least {bound:g}")
    return value


def need_cuda(device: str) -> None:
    """Ends a check whose code has run, and whose question only a device of CUDA answers."""
    if device != "cuda":
        raise Skipped("needs cuda")


# --------------------------------------------------------------------------------- the formula


def formula(dtype: torch.dtype, device: str) -> Record:
    """Each step's gradient is the formula's, in both norms; weights come back bit for bit."""
    return {
        norm: at_most(
            f"norm {norm}: distance", follow(Training(device, dtype), norm), BOUNDS[dtype]
        )
        for norm in NORMS
    }


def autocast(dtype: torch.dtype, device: str) -> Record:
    """The same where the passes run in half precision; the weights stay in float32."""
    cast = partial(torch.autocast, device, dtype)
    return {
        norm: at_most(
            f"norm {norm}: distance", follow(Training(device, cast=cast), norm), BOUNDS[dtype]
        )
        for norm in NORMS
    }


def narrow_weights(device: str) -> Record:
    """The same where the weights themselves are in bfloat16, moved in float32 and rounded once."""
    dtype = torch.bfloat16
    found: Record = {}
    for norm in NORMS:
        worst = follow(Training(device, dtype), norm, self_check=False)
        found[norm] = at_most(f"norm {norm}: distance", worst, BOUNDS[dtype])
    return found


def lora(device: str) -> Record:
    """The adapters of a small Llama, beside frozen weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, int] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    training = Training(device)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    training.model = get_peft_model(llama, config).to(device)  # pyright: ignore[reportArgumentType]
    batches = torch.randint(50, (2, 4, 12)).to(device)

    def on(ids: Tensor) -> Loss:
        return lambda call: call(input_ids=ids, labels=ids).loss

    def closure(loss: Loss) -> Closure:
        def run() -> Tensor:
            value = loss(training.model)
            value.backward()
            return value

        return run

    f, h = on(batches[0]), on(batches[1])
    found: Record = {}
    for norm in NORMS:
        worst = follow(training, norm, closure(f), closure(h), (f, h))
        found[norm] = at_most(f"norm {norm}: distance", worst, BOUNDS[torch.float32])
    return found


def mixed_devices(device: str) -> Record:
    """Some parameters on the CPU and some on the device, whichever comes first.

    The device is kept busy after the harmful pass: what is read of it too early would be wrong.
    """
    found: Record = {}
    busy = torch.randn(
        2048 if device == "cuda" else 8, 2048 if device == "cuda" else 8, device=device
    )
    for there in ("inner", "outer"):
        for norm in NORMS:
            training = Training(device, torch.float64)
            training.model.cpu()
            getattr(training.model, there).to(device)
            harmful = training.closure(1)

            def h(harmful: Closure = harmful) -> Tensor:
                loss = harmful()
                for _ in range(20):
                    torch.mm(busy, busy)
                return loss

            worst = follow(training, norm, h=h, steps=6)
            what = f"{there} on the device, norm {norm}"
            found[what] = at_most(f"{what}: distance", worst, BOUNDS[torch.float64])
    need_cuda(device)
    return found


# --------------------------------------------------------------------------------- around a step


def grad_scaler(device: str) -> Record:
    """Scaled steps are the formula's; one that overflows in any pass is skipped and not counted."""
    worst = max(scaled_steps(device, in_one_kernel) for in_one_kernel in (False, True))
    return {"distance": at_most("distance", worst, BOUNDS[torch.float16])}


def scaled_steps(device: str, in_one_kernel: bool) -> float:
    """A good step, three that overflow, one in each pass, and another good one."""
    training = Training(device, cast=partial(torch.autocast, device, torch.float16))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    base = AdamW(training.model.parameters(), lr=1e-3, fused=in_one_kernel)
    optimizer = BoosterOptimizer(base, LAM, ALPHA)
    losses: Iterator[float]  # what each pass is multiplied by

    def scaled(which: int) -> Tensor:
        loss = training.loss(which)(training.model) * next(losses)
        scaler.scale(loss).backward()
        return loss

    worst = 0.0
    for overflow in (None, 0, 1, 2, None):
        aim = wanted(training.model, training.loss(0), training.loss(1), LAM, ALPHA, "global")
        before, counted, scale = training.weights(), optimizer.step_count, scaler.get_scale()
        # The first regulariser has a pass more, which looks at the closure.
        losses = iter([torch.inf if number == overflow else 1.0 for number in range(4)])
        optimizer.zero_grad()
        optimizer.regularize(lambda: scaled(1))
        scaled(0)
        scaler.unscale_(optimizer)
        if overflow is None:
            worst = max(worst, aim.missed_by(training.gradients()))
        clip_grad_norm_(training.model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        taken, shrunk = optimizer.step_count - counted, scaler.get_scale() / scale
        if (taken, shrunk) != ((1, 1.0) if overflow is None else (0, 0.5)):
            raise AssertionError(
                f"overflow in pass {overflow}: {taken} steps were counted and the scale is "
                f"{shrunk} times what it was"
            )
        if overflow is not None:
            expect_same(training, before)
    return worst


def no_synchronisation(device: str) -> Record:
    """From the second step on nothing waits for the device, in any form of AdamW.

    What does wait: the first regulariser's look at the closure, a GradScaler's `step` around an
    optimizer that does not unscale by itself, `read_diagnostics`, and whatever the model does.
    """
    if device == "cuda":
        expect_the_device_to_tell()
    forms: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    if device == "cuda":
        forms["capturable"] = {"capturable": True}
    for name, form in forms.items():
        for norm in NORMS:
            for with_module in (False, True):
                training = Training(device, dropout=0.2)
                params = list(training.model.parameters())
                optimizer = BoosterOptimizer(
                    AdamW(params, lr=1e-3, **form),
                    *(LAM, ALPHA),
                    norm=norm,
                    module=training.model if with_module else None,
                )
                f, h = training.closure(0), training.closure(1)
                optimizer.step(f, h)  # which looks at the closure, and waits
                with refusing_synchronisation(device):
                    optimizer.zero_grad()
                    optimizer.step(f, h)
                    optimizer.zero_grad()
                    optimizer.regularize(h)
                    f()
                    clip_grad_norm_(params, 1.0)
                    optimizer.step()
                if not all(
                    map(torch.isfinite, map(torch.tensor, optimizer.read_diagnostics().values()))
                ):
                    raise AssertionError(f"{name}: the diagnostics are no numbers")
    need_cuda(device)
    return {"forms": len(forms) * len(NORMS) * 2}


@contextmanager
def refusing_synchronisation(device: str) -> Iterator[None]:
    """Context in which waiting for the device is an error, where there is one."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def expect_the_device_to_tell() -> None:
    """It refuses what waits, else the check of it would find nothing."""
    try:
        with refusing_synchronisation("cuda"):
            torch.ones((), device="cuda").item()
    except RuntimeError:
        return
    raise AssertionError("the device's debug mode let .item() pass")


def replayed_dropout(device: str) -> Record:
    """Both harmful passes draw the same masks on the device, and the stream goes on after them."""

    def at_the_weights(**options: Any) -> tuple[float, float]:
        """At α = 0 the drop is the masks' alone; beside it how much h changes from step to step."""
        training = Training(device, dropout=0.3)
        base = SGD(training.model.parameters(), lr=0.0)
        optimizer = BoosterOptimizer(base, LAM, 0.0, self_check=False, **options)
        drops, losses = [], []
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.regularize(training.closure(1))
            seen = optimizer.read_diagnostics()
            drops.append(abs(seen["harmful_loss_drop"]))
            losses.append(seen["harmful_loss"])
            training.closure(0)()
            optimizer.step()
        return max(drops), max(losses) - min(losses)

    drop, change = at_the_weights()
    unlike, _ = at_the_weights(replay_rng=False)
    return {
        "drop": at_most("drop at α = 0", drop, 1e-6),
        "drop, masks not replayed": at_least("drop without replay", unlike, 1e-4),
        "change between steps": at_least("change of h between steps", change, 1e-4),
    }


def forms_of_adamw(device: str) -> Record:
    """Weights after some steps are those of the same AdamW on the formula's gradient."""
    forms: dict[str, dict[str, bool]] = {
        "for loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    if device == "cuda":
        forms["capturable"] = {"capturable": True}
    found: Record = {} if device == "cuda" else {"capturable": "skipped: needs cuda"}
    for name, form in forms.items():
        training, twin = (Training(device, torch.float64) for _ in range(2))
        optimizer = BoosterOptimizer(
            AdamW(training.model.parameters(), lr=1e-2, **form), LAM, ALPHA
        )
        plain = AdamW(twin.model.parameters(), lr=1e-2, **form)
        start = twin.weights()
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.step(training.closure(0), training.closure(1))
            aim = wanted(twin.model, twin.loss(0), twin.loss(1), LAM, ALPHA, "global")
            for parameter, p in twin.model.named_parameters():
                p.grad = aim.gradient[parameter].to(p)
            plain.step()
        ends = twin.weights()
        apart = total({n: wide(w) - wide(ends[n]) for n, w in training.weights().items()})
        moved = total({n: wide(w) - wide(start[n]) for n, w in ends.items()})
        found[name] = at_most(f"{name}: distance over distance moved", apart / moved, 1e-7)
    return found


def closure_that_raises(device: str) -> Record:
    """Weights and gradients are as before, bit for bit, whichever harmful pass raises."""
    for fails_in in (0, 1):
        training = Training(device)
        base = fused(list(training.model.parameters()))
        optimizer = BoosterOptimizer(base, LAM, ALPHA, self_check=False)
        training.closure(0)()
        before = training.weights()
        kept = {name: torch.as_tensor(g).clone() for name, g in training.gradients().items()}
        try:
            optimizer.regularize(failing(training.closure(1), fails_in))
        except InterruptedError:
            expect_same(training, before)
        else:
            raise AssertionError(f"the error of pass {fails_in} was lost")
        for name, g in training.gradients().items():
            if not torch.equal(torch.as_tensor(g), kept[name]):
                raise AssertionError(f"the gradient of {name} has not come back")
    return {"passes": 2}


def failing(closure: Closure, fails_in: int) -> Closure:
    """The closure, whose call of this number raises when all is done."""
    numbers = count()

    def run() -> Tensor:
        loss = closure()
        if next(numbers) == fails_in:
            raise InterruptedError("by the check")
        return loss

    return run


def checkpoint_and_resume(device: str) -> Record:
    """A run that is saved, loaded onto the CPU and gone on with ends where it would have ended."""

    def made() -> tuple[Training, BoosterOptimizer]:
        training = Training(device, torch.float64)
        base = fused(list(training.model.parameters()))
        return training, BoosterOptimizer(base, LAM, ALPHA, lam_warmup_steps=4, self_check=False)

    def steps(training: Training, optimizer: BoosterOptimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(training.closure(0), training.closure(1))

    whole, optimizer = made()
    steps(whole, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "checkpoint.pt")
        torch.save([whole.model.state_dict(), optimizer.state_dict()], file)
        steps(whole, optimizer)
        again, resumed = made()
        model, state = torch.load(file, map_location="cpu", weights_only=True)
    again.model.load_state_dict(model)
    resumed.load_state_dict(state)
    steps(again, resumed)
    if resumed.step_count != optimizer.step_count:
        raise AssertionError(f"{resumed.step_count} steps, expected {optimizer.step_count}")
    ends = whole.weights()
    apart = total({n: wide(w) - wide(ends[n]) for n, w in again.weights().items()})
    return {"distance": at_most("distance", apart / total(ends), 1e-9)}


def memory(device: str) -> Record:
    """Two copies of the trainable weights beyond the gradients; one, where closures accumulate."""
    found: Record = {}
    for dtype in (torch.float32, torch.bfloat16):
        for accumulates, copies in ((False, 2), (True, 1)):
            for staged in (False, True):
                what = f"copies of {dtype}, accumulates={accumulates}, staged={staged}"
                held = copies_held(device, dtype, accumulates, staged)
                found[what] = at_least(what, at_most(what, held, copies + 0.15), copies - 0.15)
    return found


def copies_held(device: str, dtype: torch.dtype, accumulates: bool, staged: bool) -> float:
    """Peak beyond weights and gradients, in units of the weights: 64 tensors, one at a time."""
    tensors, size = 64, 2**16  # large enough for the numbers beside them to vanish
    params = [nn.Parameter(torch.randn(size, device=device, dtype=dtype)) for _ in range(tensors)]

    def closure() -> Tensor:
        losses: list[Tensor] = []
        for p in params:
            loss = p.square().sum()
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    optimizer = BoosterOptimizer(
        SGD(params, lr=1e-3), LAM, ALPHA, accumulates=accumulates, self_check=False
    )
    optimizer.step(closure, closure)
    optimizer.zero_grad()

    def step() -> None:
        if staged:
            optimizer.regularize(closure)
        else:
            optimizer.step(closure, closure)

    held = sum(p.numel() * p.element_size() for p in params)
    return peak_bytes(step, device) / held - 1  # the gradients themselves


# ------------------------------------------------------------------------- what wraps the model


class Deep(nn.Module):
    """Blocks with dropout, whose activations may be computed anew in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)
        )
        self.outer = nn.Linear(16, 8)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16) to (batch, 8)."""
        x = x.clone().requires_grad_()  # which the reentrant form asks for
        for block in self.blocks:
            anew = self.reentrant is not None
            x = checkpoint(block, x, use_reentrant=self.reentrant) if anew else block(x)  # pyright: ignore[reportArgumentType, reportAssignmentType]
        return self.outer(x)


def activation_checkpointing(device: str) -> Record:
    """Activations computed anew, dropout among them, leave the regulariser as it is."""
    made: dict[str, dict[str, Tensor]] = {}
    for name, reentrant in (("kept", None), ("reentrant", True), ("not reentrant", False)):
        training = Training(device, torch.float64)
        torch.manual_seed(1)
        training.model = Deep(reentrant).to(device, torch.float64)
        optimizer = BoosterOptimizer(fused(list(training.model.parameters())), LAM, ALPHA)
        torch.manual_seed(2)
        optimizer.regularize(training.closure(1))
        made[name] = {n: torch.as_tensor(g).clone() for n, g in training.gradients().items()}
    length = total(made["kept"])
    at_least("length of the regulariser", length, 1e-4)
    return {
        name: at_most(
            f"{name}: distance",
            total({n: g - made["kept"][n] for n, g in gradient.items()}) / length,
            1e-9,
        )
        for name, gradient in made.items()
    }


def compiled_model(device: str) -> Record:
    """A compiled model, by torch's default compiler where there is a device."""
    training = Training(device)
    forward = torch.compile(training.model, backend=_backend(device))
    f, h = training.closure(0, forward), training.closure(1, forward)
    worst = max(follow(training, norm, f, h) for norm in NORMS)
    return {"distance": at_most("distance", worst, BOUNDS[torch.float32])}


def compiled_step(device: str) -> Record:
    """Compiled closures, forward and backward in one, and a compiled step of the base optimizer."""
    training = Training(device)
    params = list(training.model.parameters())
    base = AdamW(params, lr=1e-3, capturable=device == "cuda", foreach=True)
    optimizer = BoosterOptimizer(base, LAM, ALPHA)
    backend = _backend(device)
    f, h = (torch.compile(training.closure(which), backend=backend) for which in (0, 1))
    take = torch.compile(lambda: optimizer.step(), backend=backend)
    worst = 0.0
    for step in range(4):
        aim = wanted(training.model, training.loss(0), training.loss(1), LAM, ALPHA, "global")
        optimizer.zero_grad()
        optimizer.regularize(h)
        f()
        worst = max(worst, aim.missed_by(training.gradients()))
        before = training.weights()
        take()
        if optimizer.step_count != step + 1:
            raise AssertionError(f"{optimizer.step_count} steps counted, expected {step + 1}")
        if all(torch.equal(w, before[name]) for name, w in training.weights().items()):
            raise AssertionError("the compiled step moved nothing")
    return {"distance": at_most("distance", worst, BOUNDS[torch.float32])}


def _backend(device: str) -> str:
    return "inductor" if device == "cuda" else "aot_eager"  # where no compiler of C++ is asked for


# ----------------------------------------------------------------------------------- processes


def processes(case: Callable[[str], float], world_size: int, backend: str, device: str) -> Record:
    """Runs a case on processes of their own, all on one device."""
    if backend == "nccl":
        need_cuda(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = world_size, folder, backend, device, case
        mp.start_processes(_process, arguments, nprocs=world_size, start_method="spawn")
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*"))]
    return {"distance": at_most("distance", max(found), BOUNDS[torch.float64])}


def _process(
    rank: int, world_size: int, folder: str, backend: str, device: str, case: Callable[[str], float]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        found = case(device)
        Path(folder, f"rank-{rank}").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _own_rows() -> slice:
    return slice(dist.get_rank(), None, dist.get_world_size())


def ddp(device: str) -> float:
    """Each process sees its rows; the gradient is the formula's on all of them."""
    worst = 0.0
    for norm in NORMS:
        for local in (False, True):
            training = Training(device, torch.float64)
            wrapped = DistributedDataParallel(training.model)
            f, h = (training.closure(which, wrapped, _own_rows()) for which in (0, 1))
            options = {"no_sync": wrapped.no_sync} if local else {}
            worst = max(worst, follow(training, norm, f, h, **options))
    return worst


def fsdp2(device: str) -> float:
    """The same with each process holding a part of each tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    worst = 0.0
    for norm in NORMS:
        whole, training = (Training(device, torch.float64) for _ in range(2))
        for layer in (training.model.inner, training.model.outer, training.model):
            fully_shard(layer, mesh=init_device_mesh(device, (dist.get_world_size(),)))
        base = AdamW(training.model.parameters(), lr=1e-3)
        optimizer = BoosterOptimizer(base, LAM, ALPHA, norm=norm)
        plain = AdamW(whole.model.parameters(), lr=1e-3)
        f, h = (training.closure(which, rows=_own_rows()) for which in (0, 1))
        for _ in range(3):
            aim = wanted(whole.model, whole.loss(0), whole.loss(1), LAM, ALPHA, norm)
            optimizer.zero_grad()
            optimizer.regularize(h)
            f()
            made = {n: torch.as_tensor(g).full_tensor() for n, g in training.gradients().items()}  # type: ignore[attr-defined]
            worst = max(worst, aim.missed_by(made))
            optimizer.step()
            for name, p in whole.model.named_parameters():
                p.grad = aim.gradient[name].to(p)
            plain.step()
    return worst


def sharded(device: str) -> Record:
    """FSDP2 with NCCL, which wants a device for each process; on the CPU two with gloo."""
    return (
        processes(fsdp2, 1, "nccl", device)
        if device == "cuda"
        else processes(fsdp2, 2, "gloo", device)
    )


# --------------------------------------------------------------------------------------- the list

Check = Callable[[str], Record]

CHECKS: dict[str, tuple[Check, float]] = {
    "formula, float64": (partial(formula, torch.float64), 30),
    "formula, float32": (partial(formula, torch.float32), 30),
    "autocast, bfloat16": (partial(autocast, torch.bfloat16), 30),
    "autocast, float16": (partial(autocast, torch.float16), 30),
    "bfloat16 weights": (narrow_weights, 30),
    "GradScaler": (grad_scaler, 30),
    "no synchronisation": (no_synchronisation, 30),
    "replayed dropout": (replayed_dropout, 30),
    "forms of AdamW": (forms_of_adamw, 30),
    "mixed devices": (mixed_devices, 30),
    "memory": (memory, 30),
    "closure that raises": (closure_that_raises, 30),
    "checkpoint and resume": (checkpoint_and_resume, 30),
    "activation checkpointing": (activation_checkpointing, 30),
    "LoRA": (lora, 60),
    "DDP, gloo, two processes": (partial(processes, ddp, 2, "gloo"), 60),
    "DDP, NCCL, one process": (partial(processes, ddp, 1, "nccl"), 60),
    "FSDP2": (sharded, 60),
    "compiled model": (compiled_model, 90),
    "compiled step": (compiled_step, 90),
}
"""What is checked, and for how many seconds at most; what compiles or starts processes last."""

# What the package says where a step is not what was asked for; other warnings are recorded.
SAID = "harmful_closure is not|Rounding to|This step had|The harmful pass|At step"


def jobs() -> dict[str, Job]:
    """All checks."""
    return {name: Job(partial(_checked, name), limit) for name, (_, limit) in CHECKS.items()}


def _checked(name: str, device: str, _: float, __: Keep) -> Record:
    warnings.filterwarnings("error", message=SAID)
    check, _ = CHECKS[name]
    return {"found": check(device)}
