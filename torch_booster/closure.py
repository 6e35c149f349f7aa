"""From a closure to gradients: what becomes of `.grad`, randomness and buffers meanwhile.

A closure is the user's code. It may zero gradients or leave them, loop over micro-batches, clip,
draw dropout masks, or raise. `HarmfulPasses` runs the harmful closure twice and yields −∇h(w) and
∇h(w′) − ∇h(w) whatever it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torch_booster.distributed import (
    copies,
    gradients_stay_local,
    local,
    placed_like,
    several_processes,
    version,
    zeros,
)
from torch_booster.engine import undivided
from torch_booster.functional import add_, as_float, negate_, scale_

__all__ = ["Closure", "GradWatch", "HarmfulPasses", "run", "summed"]

Closure = Callable[[], Tensor | float]


def run(closure: Closure, name: str, params: Sequence[Tensor]) -> Tensor | float:
    """Calls a closure with gradients enabled and insists that it made some.

    Args:
        closure: Runs forward and backward, returns the loss.
        name: What to call the closure in an error.
        params: Parameters, at least one of which must receive a gradient.

    Returns:
        What the closure returned.

    Raises:
        RuntimeError: No parameter received a gradient, or a gradient is sparse.
    """
    before = [_state(p) for p in params]
    with torch.enable_grad():
        loss = closure()
    _insist_on_gradients(name, params, any(map(_changed_since, params, before)))
    return loss


def _refuse_sparse(name: str, params: Sequence[Tensor]) -> None:
    for param in params:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} made a gradient of layout {param.grad.layout}, but Booster's arithmetic "
                "is dense. Build the embedding with sparse=False."
            )


def _insist_on_gradients(name: str, params: Sequence[Tensor], made: bool) -> None:
    _refuse_sparse(name, params)
    if not made:
        raise RuntimeError(
            f"{name} made no gradients: no parameter of the optimizer has a new .grad. Call "
            "loss.backward() in the closure, on a loss that depends on these parameters, and let "
            "FSDP2 reduce: not under set_requires_gradient_sync(False)."
        )


def summed(
    into: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    factors: Sequence[float] | None = None,
) -> list[Tensor | None]:
    """Adds gradients, times a number each, to gradients in place, None counting as zero.

    Args:
        into: Gradients to add to, aligned with `params` and placed as they are.
        grads: Gradients to add, aligned with `params`.
        params: The parameters they belong to.
        factors: One finite number for each; 1 if absent.

    Returns:
        For each parameter the tensor of `into`, or of `grads`, scaled, where `into` has none.
    """
    times = factors or [1.0] * len(params)
    both: list[tuple[Tensor, Tensor, float]] = []
    alone: list[tuple[Tensor, float]] = []
    for a, b, p, factor in zip(into, grads, params, times, strict=True):
        if a is not None and b is not None:
            both.append((local(a), local(placed_like(b, p)), factor))
        elif b is not None:
            alone.append((local(b), factor))
    add_([a for a, _, _ in both], [b for _, b, _ in both], [factor for *_, factor in both])
    if factors is not None:
        scale_([b for b, _ in alone], [factor for _, factor in alone])
    return [b if a is None else a for a, b in zip(into, grads, strict=True)]


class GradWatch:
    """Watches a closure: does anything but autograd's accumulation change `.grad`?

    Autograd bumps a gradient's version once for each accumulation and keeps the tensor. Any other
    writer (`zero_grad` of either kind, clipping, data parallelism) shows up as another tensor or
    as an extra version.

    Args:
        params: Leaf tensors that require gradients, each with a dense `.grad`.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._index = {id(p): index for index, p in enumerate(params)}

    def __enter__(self) -> GradWatch:
        self.start()
        self._hooks: list[Any] = []
        note = self._note
        try:
            for p in self._params:
                self._hooks.append(p.register_post_accumulate_grad_hook(note))
        except BaseException:
            self._unhook()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._unhook()
        self.stop()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def start(self) -> None:
        """Begins anew: what was seen before is forgotten."""
        self._last = [_state(p) for p in self._params]  # after the last accumulation
        self._accumulated: set[int] = set()
        self._disturbed: set[int] = set()
        self._changed: set[int] = set()
        self.zeroed: set[int] = set()  # indices whose .grad was gone when the first gradient came

    def stop(self) -> None:
        """Looks for what became of the gradients after the last accumulation."""
        self._changed = {
            index
            for index, (param, last) in enumerate(zip(self._params, self._last, strict=True))
            if _changed_since(param, last)
        }

    def _note(self, param: Tensor) -> None:
        """Runs after each accumulation of autograd into one parameter's gradient."""
        index = self._index[id(param)]
        last_grad, last_changes = self._last[index]
        self._last[index] = grad, changes = _state(param)
        if grad is not last_grad or changes != last_changes + 1:
            (self._disturbed if index in self._accumulated else self.zeroed).add(index)
        self._accumulated.add(index)

    def _edited(self) -> bool:
        return bool(self._disturbed or self._changed & self._accumulated)

    def touched(self) -> bool:
        """Whether any gradient is new or has changed."""
        return bool(self._accumulated or self._changed)

    def only_accumulated(self) -> bool:
        """Whether every `.grad` is the tensor it was, changed by accumulation alone."""
        return not (self._changed or self._disturbed or self.zeroed)

    def left_as_accumulated(self) -> bool:
        """Whether gradients are as autograd made them: nobody has averaged them, for one."""
        return bool(self._accumulated) and not self._edited()

    def dropped(self) -> set[int]:
        """Indices whose earlier gradient the closure zeroed, whether it then made one or not."""
        if not self.zeroed:
            return set()
        made = self.reached()
        gone = {i for i, p in enumerate(self._params) if p.grad is None or not made[i]}
        return self.zeroed | (self._changed & gone)

    def reached(self) -> list[bool]:
        """Which parameters the closure gave a gradient.

        A closure may write gradients by hand, so a changed `.grad` counts, unless the closure
        also edits what autograd accumulates: then it is `zero_grad` or the like passing over a
        parameter that the loss does not depend on. Another tensor in its place counts even then,
        unless data parallelism may have put it there.
        """
        edits = bool(self.zeroed) or self._edited()
        return [
            index in self._accumulated
            or (not edits and index in self._changed)
            or (p.grad is not self._last[index][0] and not several_processes())
            for index, p in enumerate(self._params)
        ]


class HarmfulPasses:
    """∇h at w and again at w′ ("regrad"), through one closure, with as little memory as it allows.

    Where the closure only accumulates, −∇h(w) stays in `.grad` and the second pass adds ∇h(w′) to
    it. Where it zeroes or edits `.grad`, −∇h(w) waits in a copy. Gradients that were there before
    are set aside and come back on exit.

    Args:
        closure: The harmful closure.
        params: The trainable parameters.
        replay_rng: Give the second pass the random state of the first (equal dropout masks).
        module: Module whose buffers both passes must find, and leave, as they are.
        no_sync: Context of the second pass.
        independent_ranks: Gradients of the first pass may differ from rank to rank.
        forget_zeroed: Gradients set aside are dropped where the closure zeroes them.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        replay_rng: bool,
        module: nn.Module | None,
        no_sync: Callable[[], AbstractContextManager[Any]],
        independent_ranks: bool,
        forget_zeroed: bool,
    ) -> None:
        self._closure = closure
        self._params = params
        self._no_sync = no_sync
        self._independent = independent_ranks
        self._forget_zeroed = forget_zeroed
        self._rng = _RandomState() if replay_rng else None
        self._buffers = _Buffers(module)
        self._kept: list[Tensor | None] = [None] * len(params)
        self._accumulates = False
        self._negative: list[Tensor | None] = []
        self._watched = ExitStack()
        self._watch: GradWatch | None = None

    def __enter__(self) -> HarmfulPasses:
        _refuse_sparse("the loop", self._params)
        present = [p.grad for p in self._params if p.grad is not None]
        kept = iter(copies(present))
        self._kept = [None if p.grad is None else next(kept) for p in self._params]
        return self

    def __exit__(self, *_: object) -> None:
        self._unwatch()
        for param, kept in zip(self._params, self._kept, strict=True):
            param.grad = kept
        self._buffers.restore()
        torch.clear_autocast_cache()

    def first(self) -> tuple[Tensor, list[Tensor | None]]:
        """Runs the closure at w.

        Returns:
            h(w), and −∇h(w) with None for parameters that the closure does not reach.
        """
        for param, zero in zip(self._params, zeros(self._params), strict=True):
            param.grad = zero  # something that zero_grad would have to touch
        watch = self._watched.enter_context(GradWatch(self._params))
        loss = self._run()
        watch.stop()
        _insist_on_gradients("harmful_closure", self._params, watch.touched())
        self._accumulates = watch.only_accumulated()
        if (
            watch.left_as_accumulated()
            and gradients_stay_local(self._params)
            and not self._independent
        ):
            raise RuntimeError(
                "The first harmful pass left each rank with gradients of its own, so that each "
                "would perturb in a direction of its own. Run it where gradients are averaged: "
                "through the DistributedDataParallel module and outside no_sync(). Where ranks "
                "train models of their own, pass independent_ranks=True."
            )
        if self._forget_zeroed:
            for index in watch.dropped():
                self._kept[index] = None
        grads = [p.grad if r else None for p, r in zip(self._params, watch.reached(), strict=True)]
        self._watch = watch
        if not self._accumulates:
            self._unwatch()  # and so let go of the zeros, where the closure has dropped them
            del watch
            pairs = zip(grads, self._params, strict=True)
            placed = [None if g is None else placed_like(g, p) for g, p in pairs]
            copied = iter(copies([g for g in placed if g is not None]))
            grads = [None if g is None else next(copied) for g in placed]
            self._clear()
        negate_([local(g) for g in grads if g is not None])
        self._negative = grads
        return loss, grads

    def second(self) -> tuple[Tensor, list[Tensor | None]]:
        """Runs the closure again, at w′, on the randomness and the buffers of the first pass.

        Returns:
            h(w′), and ∇h(w′) − ∇h(w) with None for parameters that neither pass reached. The
            tensors are no longer any parameter's `.grad`.
        """
        if self._rng is not None:
            self._rng.restore()
        self._buffers.restore()
        with self._no_sync():
            return self._second_onto_first() if self._accumulates else self._second_beside_first()

    def _second_beside_first(self) -> tuple[Tensor, list[Tensor | None]]:
        loss = self._run()
        made = any(p.grad is not None for p in self._params)
        _insist_on_gradients("harmful_closure", self._params, made)
        grads = [
            p.grad.clone() if negative is None and p.grad is not None else p.grad
            for negative, p in zip(self._negative, self._params, strict=True)
        ]
        return loss, summed(self._negative, grads, self._params)

    def _second_onto_first(self) -> tuple[Tensor, list[Tensor | None]]:
        assert self._watch is not None
        watch = self._watch
        watch.start()
        loss = self._run()
        watch.stop()
        _insist_on_gradients("harmful_closure", self._params, watch.touched())
        if not watch.only_accumulated():
            raise RuntimeError(
                "harmful_closure zeroed or edited .grad on its second call, though it only "
                "accumulated on its first. Both calls must do the same: the second one evaluates "
                "the same loss on the same batch at the perturbed weights."
            )
        difference = [
            p.grad if negative is not None or reached else None
            for negative, p, reached in zip(
                self._negative, self._params, watch.reached(), strict=True
            )
        ]
        self._clear()
        return loss, difference

    def _run(self) -> Tensor:
        # The cache would serve casts of the weights as they were before the last change.
        torch.clear_autocast_cache()
        with undivided(), torch.enable_grad():
            loss = self._closure()
        if not isinstance(loss, Tensor):
            return _loss_from_number(loss)
        if loss.dtype is torch.bool:
            raise TypeError("harmful_closure must return its loss, got a tensor of truth values.")
        if loss.numel() != 1:
            raise ValueError(
                f"harmful_closure must return a scalar loss, got a tensor of shape "
                f"{tuple(loss.shape)}. Return loss.mean() or loss.sum()."
            )
        return loss.detach().clone().reshape(())

    def _unwatch(self) -> None:
        self._watched.close()
        self._watch = None

    def _clear(self) -> None:
        for param in self._params:
            param.grad = None


class _RandomState:
    """Random state of the CPU and of every device of the accelerator in use."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._module: Any = None
        if torch.accelerator.is_available():
            self._module = torch.get_device_module()
            if hasattr(self._module, "get_rng_state_all"):
                self._devices = self._module.get_rng_state_all()
            else:
                self._devices = self._module.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            if hasattr(self._module, "set_rng_state_all"):
                self._module.set_rng_state_all(self._devices)
            else:
                self._module.set_rng_state(self._devices)


class _Buffers:
    """Values of a module's buffers, such as BatchNorm's running statistics."""

    def __init__(self, module: nn.Module | None) -> None:
        self._saved = [
            (owner._buffers, name, buffer, buffer.clone())
            for owner in (module.modules() if module is not None else ())
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for owner, name, buffer, value in self._saved:
            buffer.copy_(value)
            owner[name] = buffer


def _changed_since(param: Tensor, state: tuple[Tensor | None, int]) -> bool:
    grad, changes = state
    return param.grad is not grad or (grad is not None and version(grad) != changes)


def _state(param: Tensor) -> tuple[Tensor | None, int]:
    grad = param.grad
    return grad, -1 if grad is None else version(grad)


def _loss_from_number(loss: Any) -> Tensor:
    if isinstance(loss, bool) or not isinstance(loss, Real):
        raise TypeError(
            f"harmful_closure must return its loss, got {loss!r}. End it with `return loss`."
        )
    return torch.tensor(as_float(loss))
