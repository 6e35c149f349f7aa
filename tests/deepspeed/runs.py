"""Runs under a DeepSpeed engine, and the same runs on one process by the formula."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.reference import booster_gradient

STEPS, LAM, ALPHA, LR = 6, 5.0, 0.1, 1e-2
WORLD = 2
Values = dict[str, Tensor]


class Net(nn.Module):
    """Odd sizes; tied weights, a frozen layer, and layers that serve f, h or neither alone."""

    def __init__(self, adapter: bool = False, dropout: float = 0.0, blocks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(5, 11)
        self.twin = nn.Linear(5, 11, bias=False)
        self.twin.weight = self.inner.weight
        self.frozen = nn.Linear(11, 11).requires_grad_(False)
        self.outer = nn.Linear(11, 9)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(9, 3)
        self.align_only = nn.Linear(5, 3)
        self.harm_only = nn.Linear(5, 3)
        self.unused = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))  # counts passes, as BatchNorm does
        self.blocks = blocks
        if adapter:  # a low-rank one on a frozen base
            self.requires_grad_(False)
            self.down = nn.Linear(5, 2, bias=False)
            self.up = nn.Linear(2, 11, bias=False)
        self.adapter = adapter

    def _body(self, x: Tensor) -> Tensor:
        y = self.inner(x) + self.twin(x.flip(-1))
        if self.adapter:
            y = y + self.up(self.down(x))
        return torch.tanh(self.frozen(torch.tanh(y)))

    def forward(self, x: Tensor, harmful: bool) -> Tensor:
        with torch.no_grad():
            self.seen += 1
        body = checkpoint(self._body, x, use_reentrant=False) if self.blocks else self._body(x)
        y = self.head(torch.tanh(self.outer(self.dropout(body))))
        return y + (self.harm_only if harmful else self.align_only)(x)


@dataclass(frozen=True)
class Run:
    """One training run: what the engine is told, and what Booster is."""

    stage: int = 2
    accumulation: int = 1
    clip: float = 0.0
    lam: float = LAM
    alpha: float = ALPHA
    norm: str = "global"
    warmup: int = 0
    groups: bool = False  # two, with their own λ and α
    adapter: bool = False
    dropout: float = 0.0
    blocks: bool = False
    dtype: str = "float32"
    offload: bool = False
    steps: int = STEPS
    zero: dict[str, Any] = field(default_factory=dict[str, Any])
    more: dict[str, Any] = field(default_factory=dict[str, Any])

    def net(self) -> Net:
        return Net(self.adapter, self.dropout, self.blocks)


def batch(step: int, micro: int, harmful: bool) -> tuple[Tensor, Tensor]:
    """The global batch of a micro-batch; each rank takes its part."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + harmful)
    pair = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    return pair[0].double(), pair[1].double()


def param_groups(run: Run, model: nn.Module) -> list[dict[str, Any]]:
    held = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not run.groups:
        return [{"params": [p for _, p in held]}]
    first = [p for n, p in held if n.startswith(("inner", "harm"))]
    rest = [p for n, p in held if not n.startswith(("inner", "harm"))]
    return [
        {"params": first, "booster_lam": 2.0, "booster_alpha": 0.3},
        {"params": rest, "weight_decay": 0.0},
    ]


def oracle(run: Run, dtype: torch.dtype = torch.float64, booster: bool = True) -> Values:
    """The run on one process and the whole batch, by the formula."""
    # Not checkpointed: functional_call's weights would be gone by the time of the second forward.
    model = replace(run, blocks=False).net().to(dtype)
    base = torch.optim.AdamW(param_groups(run, model), lr=LR, weight_decay=0.1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    held = dict(model.named_parameters())
    fixed = {n: p for n, p in held.items() if n not in names} | dict(model.named_buffers())
    place = {id(p): group for group in base.param_groups for p in group["params"]}
    groups = [place[id(held[n])] for n in names]
    lams = [g.get("booster_lam", run.lam) for g in groups]
    alphas = [g.get("booster_alpha", run.alpha) for g in groups]

    def loss(data: Sequence[tuple[Tensor, Tensor]], harmful: bool) -> Callable[..., Tensor]:
        def at(values: Sequence[Tensor]) -> Tensor:
            tensors = fixed | dict(zip(names, values, strict=True))
            tensors = tensors | {"seen": torch.zeros((), dtype=dtype)}
            parts = [
                nn.functional.mse_loss(
                    functional_call(model, tensors, (x.to(dtype), harmful)), y.to(dtype)
                )
                for x, y in data
            ]
            return torch.stack(parts).mean()

        return at

    for step in range(run.steps):
        f = loss([batch(step, k, False) for k in range(run.accumulation)], False)
        h = loss([batch(step, 0, True)], True)
        now = min(1.0, step / run.warmup) if run.warmup else 1.0
        scaled = [lam * now * booster for lam in lams]
        params = [held[n] for n in names]
        found = booster_gradient(f, h, params, scaled, alphas, norm=run.norm)
        for p, g in zip(params, found, strict=True):  # an engine steps on zeros, too
            p.grad = torch.zeros_like(p) if g is None else g
        if run.clip:
            nn.utils.clip_grad_norm_(params, run.clip)
        base.step()
    return {n: held[n].detach().double() for n in names}


def config(run: Run) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": run.stage, "stage3_param_persistence_threshold": 20}
    if run.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 8 // WORLD,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.clip,
        "zero_optimization": zero | run.zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "bf16": {"enabled": run.dtype == "bfloat16"},
        "fp16": {"enabled": run.dtype == "float16", "initial_scale_power": 10},
        **run.more,
    }


def launch(run: Run, rank: int) -> Any:
    """An engine on this rank."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD}.items():
        os.environ[name] = str(value)
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    import deepspeed

    deepspeed.utils.logging.logger.setLevel("ERROR")
    if run.dtype == "float16":  # refused on a CPU, whose kernels do it all the same
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    model = run.net()
    groups = param_groups(run, model)
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(run))
    return engine


def part(x: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    return x.chunk(WORLD)[rank].to(dtype)


def loss_on(engine: Any, rank: int, step: int, micro: int, harmful: bool) -> Tensor:
    dtype = next(engine.module.parameters()).dtype
    x, y = batch(step, micro, harmful)
    out = engine(part(x, rank, dtype), harmful)
    return nn.functional.mse_loss(out.float(), part(y, rank, torch.float32))


def harmful_closure(engine: Any, rank: int, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = loss_on(engine, rank, step, 0, True)
        engine.backward(loss)
        return loss

    return closure


def booster_on(run: Run, engine: Any, **kwargs: Any) -> Any:
    from torch_booster.integrations.deepspeed import BoosterEngine

    told = {"norm": run.norm, "lam_warmup_steps": run.warmup} | kwargs
    return BoosterEngine(engine, run.lam, run.alpha, **told)


def steps(run: Run, engine: Any, booster: Any, rank: int, numbers: Sequence[int]) -> Iterator[int]:
    """Takes these steps; without a booster, as plain DeepSpeed does."""
    for step in numbers:
        for micro in range(run.accumulation):
            if booster is not None:
                booster.regularize(harmful_closure(engine, rank, step))
            engine.backward(loss_on(engine, rank, step, micro, False))
            (engine if booster is None else booster).step()
        yield step


def values(engine: Any) -> Values:
    """The whole trainable weights that the forward pass reads."""
    import deepspeed

    held = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(held.values())):
        return {n: p.detach().double().clone() for n, p in held.items()}


def train(run: Run, rank: int, booster: bool = True, **kwargs: Any) -> Values:
    engine = launch(run, rank)
    wrapped = booster_on(run, engine, **kwargs) if booster else None
    for _ in steps(run, engine, wrapped, rank, range(run.steps)):
        pass
    found = values(engine)
    engine.destroy()
    return found


def difference(a: Values, b: Values) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def noise(run: Run) -> float:
    """How far the oracle in float32 is from itself in float64."""
    return difference(oracle(run, torch.float32), oracle(run))
