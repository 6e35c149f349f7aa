"""What is refused by name, before anything is changed: hyperparameters, closures, optimizers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = [
    "NO_DEEPSPEED",
    "as_float",
    "checked",
    "checked_base",
    "checked_closure",
    "checked_count",
    "checked_flag",
    "checked_norm",
    "checked_perturbed",
    "checked_share",
    "layers",
    "shown",
]

NO_DEEPSPEED = (
    "BoosterOptimizer does not support DeepSpeed, whose engine owns gradients, weights and the "
    "step. BoosterTrainer takes the bare optimizer there. In a loop of your own prepare the bare "
    "optimizer, and put BoosterEngine of torch_booster.integrations.deepspeed around the engine, "
    "or AcceleratedEngine of torch_booster.integrations.accelerate around the accelerator's."
)

# Optional in the signature of `step`, and demanded by its code.
NEEDS_CLOSURE = {"AliG"}


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer and what it wraps, as its `optimizer`, from the outside in."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def checked(name: str, value: Any) -> float:
    """A hyperparameter as a float.

    Args:
        name: What to call it in an error.
        value: Any finite real number that is not negative.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}. Pass a float.")
    number = as_float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {shown(value)}.")
    return number


def checked_count(name: str, value: Any, least: int) -> int:
    """A whole number that is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}. Pass an int.")
    if value < least:
        raise ValueError(f"{name} is {value}. Pass at least {least}.")
    return value


def checked_flag(name: str, value: Any) -> bool:
    """Whether something is on."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return value


def checked_share(name: str, value: Any) -> float:
    """A share of something that is there: above 0, at most 1."""
    if not 0 < checked(name, value) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {shown(value)}.")
    return as_float(value)


def checked_norm(name: str, value: Any) -> Any:
    """The name of a norm."""
    if value not in ("global", "tensor"):
        raise ValueError(f'{name} is {value!r}. Pass "global" or "tensor".')
    return value


def checked_closure(name: str, closure: Any) -> Any:
    """A closure that can be called."""
    if closure is None:
        raise TypeError(
            f"step() is missing {name}. Give both closures, or call regularize(harmful_closure), "
            "loss.backward() and then step() without arguments. Lightning's automatic optimization "
            "gives one closure: optimize manually, or override optimizer_step to give both."
        )
    if not callable(closure):
        raise TypeError(
            f"{name} must be callable, got {shown(closure)}. Pass the function, not its result."
        )
    return closure


def checked_perturbed(perturbed: Any) -> list[Tensor]:
    """The weights that a simulated step is to move, each once."""
    if isinstance(perturbed, (Tensor, str, set, frozenset)) or not isinstance(perturbed, Iterable):
        raise TypeError(
            f"perturbed must be a list of tensors, got {shown(perturbed)}. Pass them in an order "
            "that is the same on every process."
        )
    found: dict[int, Tensor] = {}
    for weight in perturbed:
        _refuse_weight(weight)
        same = found.setdefault(weight.data_ptr(), weight) if weight.numel() else weight
        if same is not weight:
            raise ValueError(
                f"perturbed holds two tensors of shapes {tuple(same.shape)} and "
                f"{tuple(weight.shape)} that share their memory, and would move it twice. Pass one."
            )
    if not found:
        raise ValueError(
            f"perturbed is {shown(perturbed)}, which holds no weights. Pass a list of tensors, or "
            "None where the step is to move what trains."
        )
    return [*found.values()]


def is_sharded(weight: Tensor) -> bool:
    """Whether a process holds a part of it only (FSDP, tensor parallel)."""
    return hasattr(weight, "device_mesh") or hasattr(weight, "_fsdp_flattened")


def is_plain(weight: Tensor) -> bool:
    """Whether it is of torch's own types and can have a gradient: not quantised, not packed."""
    real = weight.is_floating_point() or weight.is_complex()
    return type(weight) in (Tensor, Parameter) and real and weight.dtype.itemsize >= 2


def _refuse_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"perturbed holds {shown(weight)}. Pass tensors, without their names.")
    what = f"perturbed holds a tensor of {weight.dtype} and shape {tuple(weight.shape)}"
    if is_sharded(weight):
        raise ValueError(
            f"{what} that is sharded (FSDP, tensor parallel) and gets no gradient while it is "
            "frozen. Leave perturbed out there, or use DDP."
        )
    if not is_plain(weight):
        raise ValueError(
            f"{what} that is quantised, or of a type of its own ({type(weight).__name__}), and can "
            "have no gradient. Load the base in a floating-point dtype, or, with LoRA, pass "
            "torch_booster.integrations.peft.MergedOffsets(model)."
        )
    if not weight.is_leaf or weight.is_inference() or weight.is_meta:
        raise ValueError(
            f"{what} that is no leaf, or is without memory or gradients of its own (meta, "
            "offloaded, made in inference mode). Pass the parameters of the loaded model."
        )


def checked_base(base_optimizer: Any, kind: type[Optimizer]) -> Optimizer:
    """An optimizer that can be wrapped in one of this `kind`."""
    if isinstance(base_optimizer, type):
        raise TypeError(
            f"base_optimizer must be an instance, got the class {base_optimizer.__name__}. Pass "
            f"{base_optimizer.__name__}(model.parameters(), ...)."
        )
    if not isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer must be a torch.optim.Optimizer, got {shown(base_optimizer)}. Pass "
            "AdamW(model.parameters(), lr=...) or the like. A wrapper that is no Optimizer (such "
            "as schedule-free's) may go around BoosterOptimizer instead: call regularize on the "
            "inner optimizer and step on the wrapper."
        )
    for layer in layers(base_optimizer):
        _refuse_layer(layer, type(layer).__name__, kind)
    for group in base_optimizer.param_groups:
        if any(hasattr(p, "ds_id") for p in group["params"]):
            raise TypeError(NO_DEEPSPEED)
        if any(hasattr(p, "main_grad") for p in group["params"]):
            raise TypeError(
                "The parameters have a main_grad, which their optimizer reads in the place of "
                ".grad, and so would never see the regulariser. Use one that reads .grad."
            )
    return base_optimizer


def _refuse_layer(layer: Any, name: str, kind: type[Optimizer]) -> None:
    if isinstance(layer, kind):
        raise TypeError("base_optimizer is a BoosterOptimizer already; wrap it once.")
    if "deepspeed" in type(layer).__module__:
        raise TypeError(f"base_optimizer is a {name}. {NO_DEEPSPEED}")
    if isinstance(layer, torch.optim.SparseAdam):
        raise TypeError(
            f"{name} takes sparse gradients only, and Booster's arithmetic is dense. Use Adam."
        )
    if hasattr(type(layer), "grad_samples"):
        raise TypeError(
            f"{name} steps on the gradients of single samples (grad_sample), those of the harmful "
            "passes among them, and never sees the regulariser. Use an optimizer that reads .grad."
        )
    offloads = any(base.__name__ == "CPUOffloadOptimizer" for base in type(layer).__mro__)
    if offloads or hasattr(layer, "fused_backward"):  # torchao's; LOMO
        raise TypeError(
            f"{name} takes the gradients during the backward pass, those of the harmful passes "
            "among them. Use an optimizer that reads .grad in step()."
        )
    if any(hasattr(layer, method) for method in ("first_step", "set_closure")):
        raise TypeError(
            f"{name} evaluates the gradient again within its step (as SAM does), and would replace "
            "the Booster gradient by the alignment gradient. Use an optimizer that reads .grad."
        )
    closure = inspect.signature(layer.step).parameters.get("closure")
    needed = closure is not None and closure.default is inspect.Parameter.empty
    if needed or name in NEEDS_CLOSURE:
        raise TypeError(
            f"{name}.step needs a closure, which it may call several times a step; the Booster "
            "gradient is computed once a step. Use an optimizer whose step() works without."
        )


def as_float(number: Any) -> float:
    """The float of a real number, infinite where it lies beyond all of them."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def shown(value: Any) -> str:
    """A value where it is short, and else its type: a whole model helps nobody in an error."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
