"""Multi-tensor arithmetic of the Booster step: perturb, restore, measure.

Everything works in place on plain (local) tensors, keeps the storage of the weights, takes scales
as tensors on the device, and so never waits for an accelerator. Mixed devices and dtypes are
sorted into multi-tensor calls of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

__all__ = [
    "add_",
    "as_float",
    "copying",
    "moved_fraction",
    "negate_",
    "norms",
    "perturb_",
    "root_sum_square",
    "scale_",
    "zero_",
]


def zero_(tensors: Sequence[Tensor]) -> None:
    """Sets each tensor to zero."""
    for _, (alike,) in _alike(tensors):
        torch._foreach_zero_(alike)


def negate_(tensors: Sequence[Tensor]) -> None:
    """Changes the sign of each tensor."""
    for _, (alike,) in _alike(tensors):
        torch._foreach_neg_(alike)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, accumulated in float32, or in float64 for float64 tensors.

    Args:
        tensors: Dense real tensors of any shape, floating dtype and device.

    Returns:
        One 0-dimensional tensor for each input, on its device.

    Example:
        >>> norms([torch.ones(4, dtype=torch.bfloat16), torch.zeros(0)])
        [tensor(2.), tensor(0.)]
    """
    result = list(tensors)
    for indices, (alike,) in _alike(tensors):
        wide = torch.float64 if alike[0].dtype is torch.float64 else torch.float32
        _put(result, indices, torch._foreach_norm(alike, 2, wide))
    return result


def root_sum_square(values: Sequence[Tensor]) -> Tensor:
    """Combines norms into one, √(Σ vᵢ²), on the device of the first.

    Args:
        values: 0-dimensional real tensors on any devices. May be empty.

    Returns:
        A 0-dimensional tensor in the widest dtype present.

    Example:
        >>> root_sum_square([torch.tensor(3.0), torch.tensor(4.0)])
        tensor(5.)
    """
    if not values:
        return torch.zeros(())
    stacked = [torch.stack(alike) for _, (alike,) in _alike(values)]
    widest = max((v.dtype for v in stacked), key=lambda dtype: dtype.itemsize)
    gathered = [v.to(values[0].device, widest, non_blocking=True) for v in stacked]
    return torch.linalg.vector_norm(torch.cat(gathered))


def perturb_(
    params: Sequence[Tensor],
    weights: Sequence[Tensor],
    direction: Sequence[Tensor],
    lengths: Sequence[Tensor],
    alphas: Sequence[float],
    norm: Tensor,
    eps: float,
) -> list[Tensor]:
    """Moves the live weights to w′ = w − α·∇h(w)/(‖∇h(w)‖ + ε).

    No temporary of the size of the weights is made: off the CPU the live weights themselves hold
    the product until the unperturbed ones are added. Weights narrower than 32 bits are computed in
    float32, one tensor at a time, and rounded once.

    Args:
        params: Live weights, at w.
        weights: Copies of w, aligned with `params`.
        direction: −∇h(w), aligned with `params`.
        lengths: The norm of each tensor of `direction`.
        alphas: α of each tensor.
        norm: ‖∇h(w)‖ over *all* trainable parameters, 0-dimensional, on any device.
        eps: ε ≥ 0. A zero norm leaves the weights where they are, whatever ε.

    Returns:
        The norm of w′ − w of each tensor: as it came out after rounding where the weights are
        narrower than 32 bits, as it was meant where they are not.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> minus_g, n = -torch.tensor([3.0, 4.0]), torch.tensor(5.0)
        >>> perturb_([w], [w.clone()], [minus_g], [n], [0.5], n, eps=0.0)
        [tensor(0.5000)]
        >>> w
        tensor([0.7000, 1.6000])

    Source: Huang et al., ICLR 2025, Algorithm 1.
    """
    reached = list(lengths)
    for indices, (live, w, towards) in _alike(params, weights, direction, by=alphas):
        n = norm.to(live[0].device, non_blocking=True)
        scale = torch.where(n > 0, alphas[indices[0]] / (n + eps), 0.0)
        if live[0].dtype.itemsize < 4:
            together = zip(live, w, towards, strict=True)
            _put(reached, indices, [_perturb_narrow_(*tensors, scale) for tensors in together])
            continue
        scale = scale.to(live[0].dtype)
        if live[0].device.type == "cpu":  # one sweep; elsewhere it would be a launch per tensor
            torch._foreach_addcmul_(live, towards, [scale] * len(live))
        else:
            torch._foreach_copy_(live, towards)
            torch._foreach_mul_(live, scale)
            torch._foreach_add_(live, w)
        _put(reached, indices, torch._foreach_mul([lengths[i] for i in indices], scale))
    return reached


def _perturb_narrow_(live: Tensor, w: Tensor, towards: Tensor, scale: Tensor) -> Tensor:
    """The same for one tensor narrower than 32 bits: computed in float32, rounded once."""
    wide = scale.float().reshape(1)  # having a dimension, it widens the product
    live.copy_(torch.addcmul(w, towards, wide).view_as(live))
    return torch.linalg.vector_norm(live.float().sub_(w))


def copying(into: Sequence[Tensor], values: Sequence[Tensor]) -> Callable[[], object]:
    """Prepares a copy, bit for bit and within the storage of the targets, as one call into C.

    Python runs signal handlers between its own instructions, and a handler may raise. A copy that
    must not be missed, in a `finally`, therefore must not be Python code.

    Args:
        into: Tensors to copy to.
        values: Tensors to copy, aligned with `into`; read when the copy is made.

    Returns:
        Makes the copy when it is first called; later calls do nothing.

    Example:
        >>> live = torch.tensor([1.0, 2.0])
        >>> restore = copying([live], [live.clone()])
        >>> _ = live.zero_()
        >>> _ = restore()
        >>> live
        tensor([1., 2.])
    """
    groups = [group for _, group in _alike(into, values)]
    copies = map(torch._foreach_copy_, [g[0] for g in groups], [g[1] for g in groups])
    return partial(list, copies)


def scale_(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiplies each tensor by its own number.

    Args:
        tensors: Dense tensors of any device and dtype.
        factors: One finite number for each.
    """
    for indices, (alike,) in _alike(tensors, by=factors):
        torch._foreach_mul_(alike, factors[indices[0]])


def add_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], factors: Sequence[float] | None = None
) -> None:
    """Adds to each tensor its counterpart, times a number of its own.

    Args:
        tensors: Dense tensors of any device and dtype.
        others: Tensors of the same shapes, devices and dtypes.
        factors: One finite number for each; 1 if absent.
    """
    for indices, (into, added) in _alike(tensors, others, by=factors):
        torch._foreach_add_(into, added, alpha=factors[indices[0]] if factors else 1)


def moved_fraction(
    params: Sequence[Tensor], weights: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[float, torch.dtype] | None:
    """Share of the weights narrower than 32 bits that a perturbation really moved.

    Only elements with a nonzero gradient count. Waits for the device.

    Args:
        params: Live weights, at w′.
        weights: Copies of w.
        direction: −∇h(w).

    Returns:
        The share, between 0 and 1, and the dtype; None where there are no such weights.
    """
    moved = wanted = 0
    narrow: torch.dtype | None = None
    for p, w, towards in zip(params, weights, direction, strict=True):
        if p.dtype.itemsize < 4:
            narrow = p.dtype
            pushed = towards != 0
            wanted += int(pushed.sum())
            moved += int(((p != w) & pushed).sum())
    return (moved / wanted, narrow) if narrow is not None and wanted else None


def as_float(number: Any) -> float:
    """The float of a real number, infinite where it lies beyond all of them.

    Example:
        >>> as_float(-(10**400))
        -inf
    """
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _alike(
    *lists: Sequence[Tensor], by: Sequence[float] | None = None
) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Aligned tensors sorted into those of one device, dtype and number, with their indices."""
    whole = range(len(lists[0]))
    if not whole:
        return
    numbers = dict.fromkeys(by or [0.0])
    for number in numbers:
        chosen = whole if by is None or len(numbers) == 1 else [i for i in whole if by[i] == number]
        parts = [[tensors[i] for i in chosen] for tensors in lists]
        sorted_: Any = _group_tensors_by_device_and_dtype(parts, True)  # pyright: ignore[reportArgumentType]
        for group, indices in sorted_.values():
            yield [chosen[i] for i in indices], group


def _put(into: list[Tensor], indices: Sequence[int], values: Sequence[Tensor]) -> None:
    for index, value in zip(indices, values, strict=True):
        into[index] = value
