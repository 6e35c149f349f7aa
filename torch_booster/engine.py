"""The one place that knows about training engines: when they step, and what they divide.

Accelerate keeps this in process-wide state. It is read here without importing Accelerate: where
nobody has imported it, there is none.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.optim import Optimizer

__all__ = [
    "NO_DEEPSPEED",
    "acts_in_backward",
    "behind_stand_in",
    "is_boundary",
    "layers",
    "refuse_unservable",
    "take_both_closures",
    "undivided",
    "wrapped_by",
]

NO_DEEPSPEED = (
    "BoosterOptimizer does not support DeepSpeed: its engine owns gradients, parameters and the "
    "step, so that the harmful passes cannot be kept out of the update. Use DDP or FSDP2."
)

Kind = TypeVar("Kind")


def layers(optimizer: Optimizer) -> Generator[Any]:
    """An optimizer and what it wraps, as its `optimizer`, from the outside in."""
    layer: Any = optimizer
    while layer is not None:
        yield layer
        layer = getattr(layer, "optimizer", None)


def wrapped_by(optimizer: Optimizer, kind: type[Kind]) -> Kind | None:
    """The instance of `kind` that an optimizer is, or wraps as its `optimizer`.

    Args:
        optimizer: An optimizer, or a wrapper such as Accelerate's.
        kind: The class to look for.

    Returns:
        The outermost such instance, None where there is none.
    """
    return next((layer for layer in layers(optimizer) if isinstance(layer, kind)), None)


def behind_stand_in(optimizer: Any) -> Any:
    """The optimizer behind Lightning's stand-in, which takes over its class but not its state."""
    return vars(optimizer).get("_optimizer", optimizer)


def acts_in_backward(optimizer: Optimizer) -> bool:
    """Whether an optimizer, or one it wraps, hangs on the gradients of its own parameters.

    Such a hook holds the optimizer, as a method does or as a function within one does. torchao's
    offloading one is known by name: its groups hold copies of the parameters with the hooks.
    """
    owners = list(layers(optimizer))
    if any(kind.__name__ == "CPUOffloadOptimizer" for kind in type(optimizer).__mro__):
        return True
    hooks = (
        hook
        for group in optimizer.param_groups
        for p in group["params"]
        for hook in ((p._backward_hooks or {}) | (p._post_accumulate_grad_hooks or {})).values()
    )
    return any(holder is owner for hook in hooks for holder in _held_by(hook) for owner in owners)


def _held_by(hook: Any) -> list[Any]:
    if isinstance(hook, functools.partial):
        return [*hook.args, *_held_by(hook.func)]
    hook = inspect.unwrap(hook)
    cells = getattr(hook, "__closure__", None) or ()
    return [getattr(hook, "__self__", None), *gc.get_referents(*cells)]


def is_boundary() -> bool:
    """Whether this micro-batch steps; false within `accelerator.accumulate` on all but the last."""
    return _accelerate("GradientState").get("sync_gradients", True)


@contextmanager
def undivided() -> Generator[None]:
    """Context in which `accelerator.backward` does not divide by the accumulation steps.

    The regulariser enters a step once, whatever the number of micro-batches: divided, λ would
    silently become λ/accumulation steps.
    """
    state = _accelerate("GradientState")
    kept = state.get("plugin_kwargs")
    if kept is None:
        yield
        return
    state["plugin_kwargs"] = {**kept, "num_steps": 1}
    try:
        yield
    finally:
        state["plugin_kwargs"] = kept


def refuse_unservable() -> None:
    """Raises where Accelerate's engine would mix the harmful passes into its update.

    Raises:
        RuntimeError: DeepSpeed; or FSDP with gradient accumulation that keeps the unreduced
            gradients of earlier micro-batches, to which harmful ones would be added.
    """
    engine = _accelerate("AcceleratorState").get("distributed_type")
    if engine == "DEEPSPEED":
        raise RuntimeError(NO_DEEPSPEED)
    accumulation = _accelerate("GradientState").get("plugin_kwargs", {})
    if (
        engine == "FSDP"
        and accumulation.get("num_steps", 1) > 1
        and not accumulation.get("sync_each_batch", False)
    ):
        raise RuntimeError(
            "FSDP keeps the gradients of earlier micro-batches unreduced, and the harmful passes "
            "would reduce them along with their own. Reduce each micro-batch: Accelerator("
            "gradient_accumulation_plugin=GradientAccumulationPlugin("
            f"num_steps={accumulation['num_steps']}, sync_each_batch=True))."
        )


def take_both_closures(kind: type[Any]) -> None:
    """Lets the optimizer that Accelerate's `prepare` returns pass both closures on.

    Its own `step` takes one closure. Two were a TypeError before; one or none mean what they did.

    Args:
        kind: The Booster optimizer's class.
    """
    accelerated: Any = sys.modules["accelerate.optimizer"].AcceleratedOptimizer
    with_one = accelerated.step
    if getattr(with_one, "takes_both", False):
        return

    @functools.wraps(with_one)
    def step(self: Any, closure: Any = None, harmful_closure: Any = None) -> Any:
        booster = wrapped_by(self, kind)
        if booster is None or harmful_closure is None:
            return with_one(self, closure, *(() if harmful_closure is None else (harmful_closure,)))
        loss = booster._combine(closure, harmful_closure)
        with_one(self)
        return loss

    step.takes_both = True  # type: ignore[attr-defined]
    accelerated.step = step


def _accelerate(name: str) -> dict[str, Any]:
    """Attributes of one of Accelerate's singletons, empty until an Accelerator has been made."""
    module = sys.modules.get("accelerate.state")
    return {} if module is None else getattr(module, name)._shared_state
