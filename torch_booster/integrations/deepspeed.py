"""The Booster step around a DeepSpeed engine, on ZeRO stages 0, 1, 2 and 3.

    engine, *_ = deepspeed.initialize(model=model, model_parameters=..., config=config)
    booster = BoosterEngine(engine, lam=5.0, alpha=0.1)

    for batch, harmful_batch in zip(loader, harmful_loader):     # micro-batches
        booster.regularize(harmful_closure)                      # before the first of a step
        engine.backward(alignment_loss(engine, batch))
        booster.step()                                           # in the place of engine.step()

An engine owns gradients, float32 masters and forward weights, each in a layout of its own. Three
adapters show what a rank holds of them as aligned lists of pieces; the arithmetic is the core's.
What they touch is internal to DeepSpeed, so that classes and versions are named, everything else
is refused, and the first regulariser looks whether the engine did what it was told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_booster.checks import checked_closure, layers
from torch_booster.closure import Buffers, Closure, RandomState, loss_of
from torch_booster.diagnostics import warn_of_passes
from torch_booster.distributed import copies
from torch_booster.functional import (
    add_,
    copying,
    moved_fraction,
    norms,
    perturb_,
    scale_,
    step_sizes,
    subtract_,
)
from torch_booster.hyperparameters import STEP, Hyperparameters, Now

__all__ = ["BoosterEngine"]

VERSIONS = (0, 19, 8), (0, 20)  # from the one on which this was tested to the next that may differ


class BoosterEngine(Hyperparameters):
    r"""Lets a DeepSpeed engine step on the Booster gradient.

    $$ g = \nabla f(w) + \lambda\,\Bigl(\nabla h(w) - \nabla h\bigl(w - \alpha\,
       \tfrac{\nabla h(w)}{\lVert\nabla h(w)\rVert + \varepsilon}\bigr)\Bigr) $$

    w are the float32 masters (on stage 0, and on stage 1 with bf16 weights and float32 gradients,
    the weights themselves), and norms are over all ranks. λ is not divided by the accumulation
    steps; clipping sees the combined gradient. With λ = 0 nothing is run and the engine is left as
    it is, bit for bit.

    λ, α and the number of steps live in the param groups of the engine's optimizer, where groups
    given to `deepspeed.initialize` may bring their own `booster_lam` and `booster_alpha`. The
    engine's checkpoints hold them, so that a resumed schedule goes on.

    Memory: two copies of this rank's shard, of gradients and of masters, while the harmful passes
    run, and one, of the gradients, until the step.

    Args:
        engine: What `deepspeed.initialize` returned.
        lam: λ ≥ 0, regulariser intensity.
        alpha: α ≥ 0, length of the simulated harmful step, in units of ‖w‖.
        norm: "global", the paper's one norm, or "tensor", one for each tensor.
        lam_warmup_steps: As `BoosterOptimizer` takes it.
        lam_delay_steps: The same.
        every: The same.
        eps: The same.
        trust_region: The same.
        replay_rng: The same.
        self_check: Look at the first regulariser, by one more harmful pass: the passes repeat and
            leave nothing behind, the forward weights move by α and come back bit for bit.

    Raises:
        TypeError: `engine` is no plain DeepSpeedEngine, or its optimizer is of an unknown class.
        ValueError: A hyperparameter is out of its range.
        RuntimeError: DeepSpeed's version, or a feature that is switched on, is not supported.
    """

    def __init__(
        self,
        engine: Any,
        lam: float = 5.0,
        alpha: float = 0.1,
        *,
        norm: Literal["global", "tensor"] = "global",
        lam_warmup_steps: int = 0,
        lam_delay_steps: int = 0,
        every: int = 1,
        eps: float = 1e-7,
        trust_region: bool = False,
        replay_rng: bool = True,
        self_check: bool = True,
    ) -> None:
        self._now = Now(checked=not self_check)
        self._set(lam, alpha, norm, lam_warmup_steps, lam_delay_steps, every, eps, trust_region)
        refuse_what_cannot_work(engine)
        self.engine = engine
        self.replay_rng = replay_rng
        self._shards = _ADAPTERS[_name_of(engine.optimizer)](engine)
        self._waiting: list[Tensor] | None = None  # ∇h(w) − ∇h(w′), piece by piece
        self._waiting_since = 0  # the engine's count of steps
        self._groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the engine's optimizer, with `booster_lam` and its fellows."""
        return self.engine.optimizer.param_groups

    def regularize(self, harmful_closure: Closure) -> Tensor | None:
        """Runs the harmful passes, before the first micro-batch of a step, and else nothing.

        A loop over micro-batches may call it before each. What it finds waits for `step`.

        Args:
            harmful_closure: Runs one forward pass of h through the engine and one
                `engine.backward(loss)`, and returns the loss. Called twice, on one batch.

        Returns:
            h(w), averaged over the ranks; None where nothing was run.

        Raises:
            TypeError: `harmful_closure` is not callable or returns no loss.
            RuntimeError: It ran no backward pass or several, an alignment pass came before it, or
                the last step was not taken by `step` of this class.
        """
        h = checked_closure("harmful_closure", harmful_closure)
        if self._waiting is not None:
            self._refuse_stale()
            return None  # a later micro-batch of the same step
        return self._regularize(h)

    def _regularize(self, h: Closure) -> Tensor | None:
        if not self.is_due():
            return None
        if not self._shards.is_fresh():
            raise RuntimeError(
                "The engine holds gradients already, which the harmful passes would drop. Call "
                "regularize before the first micro-batch of a step."
            )
        self._waiting = self._difference(h)
        self._waiting_since = self.engine.global_steps
        return self._now.diagnostics.harmful_loss if self._now.diagnostics is not None else None

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """`engine.step()`, on the combined gradient where the engine really steps.

        Args:
            lr_kwargs: As the engine takes it.

        Raises:
            RuntimeError: A regulariser waits for a step that `engine.step()` has taken.
        """
        difference = None
        if self.engine.is_gradient_accumulation_boundary():
            difference, self._waiting = self._waiting, None
            if difference is not None:
                self._refuse_stale()
                self._add(difference)
            else:
                self._now.diagnostics = None
                if self.is_due():
                    self._tell(
                        "plain",
                        "This step had no regulariser although λ is not zero: regularize() was "
                        "not called before its first micro-batch. Call it there, or set "
                        "booster.lam = 0 for plain steps.",
                    )
        self.engine.step(lr_kwargs)
        if difference is not None:
            # Else parameters that the next alignment pass does not reach take it once more.
            self._shards.forget()
        if self.engine.was_step_applied():  # neither between boundaries nor where fp16 overflowed
            for group in self._groups():
                group[STEP] += 1

    @torch.no_grad()
    def _difference(self, harmful_closure: Closure) -> list[Tensor]:
        """∇h(w) − ∇h(w′) of this rank's pieces; weights and gradients are left as they were."""
        shards, check = self._shards, not self._now.checked
        groups = self._groups()
        alphas = [self._alpha(groups[i]) for i in shards.group_of]
        with _HarmfulPasses(harmful_closure, self.engine, shards, self.replay_rng) as harmful:
            trial = harmful.run() if check else None
            h, g = harmful.run()  # h(w), ∇h(w), multiplied by the loss scale
            scale = shards.loss_scale()
            n = shards.tensor_norms(norms(g)) / scale  # ‖∇ᵢh(w)‖
            s = step_sizes(n, alphas, self.norm, self.eps)
            postponed = check and not bool(n.isfinite().all())  # fp16 overflows, and skips the step
            check = check and not postponed
            expected = (s * n * n).sum()

            live = shards.masters()
            w = copies(live)
            restore = copying(live, w)
            if check:
                self._insist("the forward weights are the masters", shards.are_forward(live))
            try:
                moved = perturb_(live, w, g, shards.by_piece(s / scale))  # w′ = w − s·∇h(w)
                shards.push()
                length = s * n if moved is None else shards.tensor_norms(moved)
                if trial is not None and check:
                    self._look_at(trial, h, g, expected, length, live, w)
                h_prime, difference = harmful.run_against(g)  # ∇h(w) − ∇h(w′)
            finally:
                restore()
                shards.push()
            if check:
                self._insist("the forward weights come back", shards.are_forward(w))
        self._note(h, h_prime, n, length, expected)
        self._now.checked = not postponed
        return difference

    def _look_at(
        self,
        trial: tuple[Tensor, list[Tensor]],
        h: Tensor,
        g: list[Tensor],
        expected: Tensor,
        length: Tensor,
        live: list[Tensor],
        w: list[Tensor],
    ) -> None:
        """Looks at w′, once, whether the engine and the closure do what the step takes for granted.

        Accumulators that keep the trial's gradients, weights that are not moved: both would make
        no error, only another step.
        """
        shards = self._shards
        first, before = trial
        subtract_(before, g)
        left, whole = (_whole(shards.tensor_norms(norms(x))) for x in (before, g))
        same_loss = abs(first.item() - h.item()) <= 1e-5 * abs(h.item())
        self._insist("a pass leaves no gradients to the next", not same_loss or left <= 0.1 * whole)
        difference = copies(live)
        subtract_(difference, w)
        moved, wanted = _whole(shards.tensor_norms(norms(difference))), _whole(length)
        self._insist("the weights move by alpha", abs(moved - wanted) <= 0.01 * wanted)
        self._insist("the forward weights move with the masters", shards.are_forward(live))
        after, before = ([x.to(shards.forward_dtype) for x in tensors] for tensors in (live, w))
        warn_of_passes(first, h, expected, moved_fraction(after, before, g))

    def _insist(self, what: str, holds: bool) -> None:
        """Raises, on all ranks, where something does not hold on one of them."""
        fails = self._shards.any_rank(not holds)
        if fails:
            raise RuntimeError(
                f"Self-check failed: under DeepSpeed {_version()}, with "
                f"{_name_of(self.engine.optimizer)}, it does not hold that {what}. A step would be "
                "silently wrong. Use DDP or FSDP2, or another ZeRO stage."
            )

    @torch.no_grad()
    def _add(self, difference: list[Tensor]) -> None:
        """Adds λ·(∇h(w) − ∇h(w′)) to what the engine's step will read."""
        groups = self._groups()
        lams = [self._lam(groups[self._shards.group_of[i]]) for i in self._shards.tensor_of]
        live = self._shards.gradients()
        rows = [row for row in zip(live, difference, lams, strict=True) if row[2]]
        scale_([d for _, d, _ in rows], [lam for *_, lam in rows])
        add_([g for g, *_ in rows], [d for _, d, _ in rows])
        self._shards.changed()
        self._adapt_alpha()

    def _refuse_stale(self) -> None:
        if self._waiting_since != self.engine.global_steps:
            self._waiting = None
            raise RuntimeError(
                "engine.step() took a step without the regulariser that waited for it. Call "
                "booster.step() in its place."
            )


class _HarmfulPasses:
    """∇h at w and again at w′, each alone in the accumulators of the engine.

    Args:
        closure: The harmful closure.
        engine: The DeepSpeedEngine.
        shards: Its adapter.
        replay_rng: Give each pass the random state of the first.
    """

    def __init__(self, closure: Closure, engine: Any, shards: _Shards, replay_rng: bool) -> None:
        self._closure = closure
        self._engine = engine
        self._shards = shards
        self._rng = RandomState() if replay_rng else None
        self._buffers = Buffers(engine.module)

    def __enter__(self) -> _HarmfulPasses:
        # The last step's gradients are still there for parameters that no pass reaches by now.
        self._shards.forget()
        return self

    def __exit__(self, *_: object) -> None:
        self._shards.forget()
        self._buffers.restore()
        torch.clear_autocast_cache()

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """The loss where the weights are, averaged over the ranks, and copies of its gradients."""
        loss = self._call()
        g = copies(self._shards.gradients())
        self._shards.forget()
        return loss, g

    def run_against(self, g: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss elsewhere, and g − its gradients, for which g is written over."""
        loss = self._call()
        subtract_(g, self._shards.gradients())
        self._shards.forget()
        return loss, g

    def _call(self) -> Tensor:
        if self._rng is not None:
            self._rng.restore()
        self._buffers.restore()
        torch.clear_autocast_cache()
        with _one_backward(self._engine), torch.enable_grad():
            loss = loss_of(self._closure())
        return self._shards.mean(loss)


@contextmanager
def _one_backward(engine: Any) -> Generator[None]:
    """Context of one backward pass that is reduced to its end and not divided, and of no step.

    Divided by the accumulation steps, λ would silently be λ/accumulation steps; a step would train
    the model towards harm.
    """
    boundary, backward, passes = engine._is_gradient_accumulation_boundary, engine.backward, 0
    unsynced = engine.inside_no_sync_ctxt  # around the first of several micro-batches

    def whole(loss: Tensor, retain_graph: bool = False, **_: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > 1:
            raise RuntimeError(
                "harmful_closure ran engine.backward several times, of which the engine would keep "
                "the last. Run one, on one batch."
            )
        engine.set_gradient_accumulation_boundary(True)  # which a wrapper may have reset by now
        return backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def step(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "harmful_closure called engine.step, which would train the model towards harm. Leave "
            "the step out; accelerator.backward takes it too, if there is no AcceleratedEngine of "
            "torch_booster.integrations.accelerate."
        )

    engine.set_gradient_accumulation_boundary(True)
    engine.inside_no_sync_ctxt = False
    engine.backward, engine.step = whole, step
    try:
        yield
        if not passes:
            raise RuntimeError(
                "harmful_closure made no gradients through the engine: call engine.backward(loss) "
                "in it, once, in the place of loss.backward()."
            )
    finally:
        del engine.backward, engine.step  # the class's own show again
        engine.inside_no_sync_ctxt = unsynced
        engine._is_gradient_accumulation_boundary = boundary
        if hasattr(engine.optimizer, "set_gradient_accumulation_boundary"):
            now = engine.is_gradient_accumulation_boundary()
            engine.optimizer.set_gradient_accumulation_boundary(now)


# ---------------------------------------------------------------------- what a rank holds


class _Shards:
    """Masters, gradients and forward weights of one rank, as aligned lists of pieces.

    `tensors` are all trainable parameters, in one order on every rank, `group_of` says in which
    param group each is, and `tensor_of` of which of them each piece is a part.
    """

    tensor_of: list[int]
    sharded = True  # the pieces of a tensor are on several ranks, else whole on each

    def __init__(self, engine: Any, groups: Sequence[Sequence[Tensor]]) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.tensors = [p for group in groups for p in group]
        self.group_of = [i for i, group in enumerate(groups) for _ in group]
        self.number = {id(p): i for i, p in enumerate(self.tensors)}
        if not self.tensors:
            raise RuntimeError("No parameter of the engine requires a gradient. Unfreeze some.")
        self.forward_dtype = self.tensors[0].dtype

    def masters(self) -> list[Tensor]:
        """The weights that an optimizer's step would change."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """What the engine's step will read, reduced over the ranks."""
        raise NotImplementedError

    def forward_weights(self) -> list[Tensor]:
        """What the forward pass reads, of the same pieces."""
        raise NotImplementedError

    def is_fresh(self) -> bool:
        """Whether no backward pass has been run since the last step."""
        raise NotImplementedError

    def forget(self) -> None:
        """Leaves the accumulators as they are at the start of a step."""
        raise NotImplementedError

    def push(self) -> None:
        """Copies the masters to the weights that the forward pass uses, on all ranks."""

    def changed(self) -> None:
        """Tells the engine that its gradients were changed after it looked at them."""

    def loss_scale(self) -> float:
        """The number by which the engine multiplies a loss."""
        return float(getattr(self.optimizer, "loss_scale", 1.0))

    def tensor_norms(self, pieces: Sequence[Tensor]) -> Tensor:
        """The norm of each whole tensor, from the norms of its pieces."""
        device = self.tensors[0].device
        squares = torch.zeros(len(self.tensors), device=device)
        if pieces:
            index = torch.tensor(self.tensor_of, device=device)
            squares.index_add_(0, index, torch.stack([x.to(squares) for x in pieces]).square())
        if self.sharded:
            torch.distributed.all_reduce(squares, group=self.engine.data_parallel_group)
        return squares.sqrt()

    def by_piece(self, sizes: Tensor) -> Tensor:
        """A number for each piece, from one for each tensor or for all."""
        return sizes if sizes.ndim == 0 else sizes[torch.tensor(self.tensor_of, dtype=torch.long)]

    def are_forward(self, masters: Sequence[Tensor]) -> bool:
        """Whether the forward pass reads these masters, rounded, bit for bit."""
        pairs = zip(self.forward_weights(), masters, strict=True)
        return all(torch.equal(x, m.to(x).reshape(x.shape)) for x, m in pairs)

    def mean(self, loss: Tensor) -> Tensor:
        """A loss averaged over the ranks."""
        loss = loss.to(self.tensors[0].device, torch.float32)
        torch.distributed.all_reduce(loss, group=self.engine.data_parallel_group)
        return loss / torch.distributed.get_world_size(self.engine.data_parallel_group)

    def any_rank(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        seen = torch.tensor(float(flag), device=self.tensors[0].device)
        torch.distributed.all_reduce(seen, group=self.engine.data_parallel_group)
        return seen.item() > 0


class _Replicated(_Shards):
    """Weights that are whole on each rank: stage 0, and stage 1 in bf16 with float32 gradients."""

    sharded = False

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self.is_bf16 = hasattr(optimizer, "bf16_groups")
        groups = getattr(optimizer, "bf16_groups", getattr(optimizer, "fp16_groups", None))
        if groups is None:
            groups = [[p for p in x["params"] if p.requires_grad] for x in optimizer.param_groups]
        super().__init__(engine, groups)
        self.tensor_of = list(range(len(self.tensors)))

    def loss_scale(self) -> float:
        return 1.0  # fp16 is refused here

    def masters(self) -> list[Tensor]:
        return [p.detach() for p in self.tensors]

    forward_weights = masters

    def gradients(self) -> list[Tensor]:
        if self.is_bf16:
            flat = [g for group in self.optimizer.fp32_groups_gradients for g in group]
            return [g.view(p.shape) for g, p in zip(flat, self.tensors, strict=True)]
        for p in self.tensors:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in self.tensors if p.grad is not None]

    def is_fresh(self) -> bool:
        if self.is_bf16:
            return not any(any(group) for group in self.optimizer.fp32_groups_has_gradients)
        return all(p.grad is None for p in self.tensors)

    def forget(self) -> None:
        if self.is_bf16:
            self.optimizer.zero_grad()
        self.engine.zero_grad()

    def changed(self) -> None:
        if self.is_bf16:  # which leaves those out of the norm that no backward pass has reached
            flags = self.optimizer.fp32_groups_has_gradients
            flags[:] = [[True] * len(group) for group in flags]


class _Stage1And2(_Shards):
    """Flat partitions that cross tensors: each rank has a run of each group's elements."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        super().__init__(engine, optimizer.bit16_groups)
        rank = torch.distributed.get_rank(engine.data_parallel_group)
        self.tensor_of = []
        self.places: list[tuple[int, int, int, int]] = []  # group, in it, in the tensor, elements
        for i, params in enumerate(optimizer.params_in_partition):
            for p in params:
                key = optimizer.get_param_id(p)
                start = int(optimizer.grad_start_offset[i][rank][key])
                into = int(optimizer.grad_partition_insertion_offset[i][rank][key])
                size = min(p.numel() - start, int(optimizer.partition_size[i]) - into)
                self.tensor_of.append(self.number[id(p)])
                self.places.append((i, into, start, size))

    def _cut(self, flats: Sequence[Tensor]) -> list[Tensor]:
        return [flats[i].view(-1).narrow(0, into, size) for i, into, _, size in self.places]

    def masters(self) -> list[Tensor]:
        flats = self.optimizer.single_partition_of_fp32_groups
        return self._cut([flat.detach() for flat in flats])

    def forward_weights(self) -> list[Tensor]:
        rows = zip(self.tensor_of, self.places, strict=True)
        return [
            self.tensors[t].detach().view(-1).narrow(0, start, size)
            for t, (_, _, start, size) in rows
        ]

    def gradients(self) -> list[Tensor]:
        if self.optimizer.cpu_offload:
            return self._cut([m.grad for m in self.optimizer.single_partition_of_fp32_groups])
        found: list[Tensor] = []
        for i, params in enumerate(self.optimizer.params_in_partition):
            parts = self.optimizer.averaged_gradients[i]
            real = [x for x in parts if not getattr(x, "_zero_padding", False)]
            found += [x.view(-1) for x in real[: len(params)]]  # and then what fills it up
        sizes = [x.numel() for x in found]
        if sizes != [size for *_, size in self.places]:
            raise RuntimeError("The engine's gradients are not laid out as its weights are.")
        return found

    def is_fresh(self) -> bool:
        return self.optimizer.micro_step_id < 0 and all(
            p.grad is None and getattr(p, "grad_accum", None) is None for p in self.tensors
        )

    def forget(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = -1
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for i in kept:
                kept[i] = None
        if optimizer.cpu_offload:  # where parameters that a pass does not reach keep the last one's
            optimizer.reset_cpu_buffers()
            for m in optimizer.single_partition_of_fp32_groups:
                m.grad.zero_()

    def push(self) -> None:
        self.optimizer.update_lp_params()

    def changed(self) -> None:
        if self.optimizer.cpu_offload:  # whose clipping reads norms that backward took
            _renorm(self, self.optimizer.get_param_id)


class _Stage3(_Shards):
    """A run of each tensor's elements on each rank; forward weights are gathered when needed."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        subs = optimizer.fp16_groups
        super().__init__(engine, subs)
        self.group_of = [
            optimizer.sub_group_to_group_id[i] for i, group in enumerate(subs) for _ in group
        ]
        self.tensor_of = list(range(len(self.tensors)))

    def _cut(self, flats: Sequence[Tensor]) -> list[Tensor]:
        places = [
            self.optimizer.grad_position[self.optimizer.get_param_id(p)] for p in self.tensors
        ]
        return self._unpadded([flats[i].view(-1).narrow(0, into, n) for i, into, n in places])

    def _unpadded(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Without what fills up a partition: whatever was in memory, NaN among it."""
        spans = [_span(p) for p in self.tensors]
        return [x.view(-1)[: b - a] for x, (a, b) in zip(pieces, spans, strict=True)]

    def masters(self) -> list[Tensor]:
        return self._cut([flat.detach() for flat in self.optimizer.fp32_partitioned_groups_flat])

    def forward_weights(self) -> list[Tensor]:
        return [_resident(p) for p in self.tensors]

    def gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return self._cut([m.grad for m in self.optimizer.fp32_partitioned_groups_flat])
        averaged = self.optimizer.averaged_gradients
        groups = range(len(self.optimizer.fp16_groups))
        return self._unpadded([x for i in groups for x in averaged[i]])

    def is_fresh(self) -> bool:
        optimizer = self.optimizer
        return optimizer.micro_step_id == 0 and not optimizer._epilogue_ran_this_backward

    def forget(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        # Parameters that a pass does not reach keep here what the last one made of them.
        optimizer.grad_partitions_flat_buffer.zero_()
        optimizer.averaged_gradients = {}
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            for m in optimizer.fp32_partitioned_groups_flat:
                m.grad.zero_()

    def push(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()  # else small, resident weights keep their values
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def changed(self) -> None:
        if self.optimizer.offload_optimizer:
            _renorm(self, self.optimizer.get_param_id)


def _span(p: Any) -> tuple[int, int]:
    """From where to where in a ZeRO-3 parameter this rank's part reaches."""
    size, whole = p.partition_numel(), p.ds_numel
    start = min(whole, torch.distributed.get_rank(p.ds_process_group) * size)
    return start, min(whole, start + size)


def _resident(p: Any) -> Tensor:
    """This rank's part of a ZeRO-3 parameter, out of the whole weight where that is in memory."""
    start, end = _span(p)
    if p.ds_status.name != "AVAILABLE":
        return p.ds_tensor.detach().view(-1)[: end - start]
    return p.detach().view(-1)[start:end]


def _renorm(shards: _Shards, key: Callable[[Tensor], Any]) -> None:
    known = shards.optimizer.norm_for_param_grads
    for t, gradient in zip(shards.tensor_of, shards.gradients(), strict=True):
        known[key(shards.tensors[t])] = torch.linalg.vector_norm(gradient.double())


def _whole(lengths: Tensor) -> float:
    return torch.linalg.vector_norm(lengths).item()


# ---------------------------------------------------------------------- what is refused


def _name_of(thing: Any) -> str:
    """The exact name of its class; that of torch's optimizers, on which stage 0 steps in float32.

    A subclass is not what was tested. Names, because importing DeepSpeed takes seconds.
    """
    if isinstance(thing, torch.optim.Optimizer):
        return "torch.optim"
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _version() -> str:
    return str(sys.modules["deepspeed"].__version__)


_ADAPTERS: dict[str, Callable[[Any], _Shards]] = {
    "torch.optim": _Replicated,
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": _Replicated,
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": _Replicated,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": _Replicated,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": _Stage1And2,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": _Stage3,
}


def refuse_what_cannot_work(engine: Any) -> None:
    """Raises where an engine is not one on which the step was tested.

    Args:
        engine: What `deepspeed.initialize` returned.

    Raises:
        TypeError: It is no plain DeepSpeedEngine, or has an optimizer of an unknown class.
        RuntimeError: DeepSpeed's version, or a feature that is switched on, is not supported.
    """
    if _name_of(engine) != "deepspeed.runtime.engine.DeepSpeedEngine":
        raise TypeError(
            f"engine is a {type(engine).__name__}. Pass the plain DeepSpeedEngine that "
            "deepspeed.initialize returns; pipeline and hybrid engines are not supported."
        )
    least, limit = VERSIONS
    version = tuple(int(x) for x in _version().split("+")[0].split(".")[:3])
    if not least <= version < limit:
        raise RuntimeError(
            f"DeepSpeed {_version()} is installed, whose internals were not looked at. "
            f"Install deepspeed>={_dotted(least)},<{_dotted(limit)}."
        )
    if any(isinstance(layer, Hyperparameters) for layer in layers(engine.optimizer)):
        raise TypeError(
            "The engine steps a BoosterOptimizer, which would count each step once more. Give "
            "DeepSpeed the base optimizer."
        )
    name = _name_of(engine.optimizer)
    if name not in _ADAPTERS:
        raise TypeError(
            f"The engine's optimizer is a {name}, which has no adapter. Use ZeRO 0 to 3 with a "
            "plain optimizer."
        )
    for feature, on in _features(engine).items():
        if on:
            raise RuntimeError(
                f"{feature} is not supported with Booster under DeepSpeed. Switch it off, or use "
                "DDP or FSDP2."
            )


def _features(engine: Any) -> dict[str, Any]:
    """What is not supported, by name, and whether it is on."""
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    base: Any = getattr(engine, "basic_optimizer", None)
    held: list[nn.Parameter] = list(engine.module.parameters())
    return {
        "Parameter offload (offload_param)": _offloads(zero.offload_param),
        "Offload to NVMe": offload is not None and str(offload.device).endswith("nvme"),
        "Partial offload (ratio)": offload is not None and engine.zero_partial_offload() != 1,
        "SuperOffload": engine.super_offload(),
        "ZenFlow": engine.zenflow,
        "hpZ (zero_hpz_partition_size)": engine.zero_hpz_partition_size() > 1,
        "Quantised weights": engine.zero_quantized_weights()
        or engine.zero_quantized_nontrainable_weights(),
        "Quantised gradients": engine.zero_quantized_gradients(),
        "Mixture of experts": engine.has_moe_layers,
        "Model parallelism (mpu, autotp)": engine.mpu is not None or engine.autotp_size() > 1,
        "Sequence parallelism": engine.sequence_parallel_size > 1,
        "managed_gradient_accumulation=false": not engine.managed_gradient_accumulation(),
        "DeepCompile": engine.is_deepcompile_enabled(),
        "torch_autocast": engine.torch_autocast_enabled(),
        "fp16 on stage 0": engine.fp16_enabled() and engine.zero_optimization_stage() == 0,
        "Masters in 16 bits": engine.fp16_master_weights_and_gradients()
        or engine.bf16_master_weights_and_gradients(),
        "Random-LTD": engine.random_ltd_enabled(),
        "Sparse gradients": any(getattr(m, "sparse", False) for m in engine.module.modules()),
        "Muon": "muon" in type(base).__name__.lower() or any(hasattr(p, "use_muon") for p in held),
        "A 1-bit optimizer": "onebit" in type(base).__module__,
    }


def _offloads(config: Any) -> bool:
    return config is not None and not str(config.device).endswith("none")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
