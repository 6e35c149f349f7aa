"""Multi-tensor arithmetic of the Booster step: perturb, restore, measure.

Everything works in place on plain (local) tensors, keeps the storage of the weights, takes scales
as tensors on the device, and so never waits for an accelerator. Mixed devices and dtypes are
sorted into multi-tensor calls of one kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["add_", "moved_fraction", "norms", "perturb_", "restore_", "root_sum_square", "scale_"]

Kind = TypeVar("Kind", bound=Hashable)


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
    result: list[Tensor] = list(tensors)
    for (_, dtype), indices in _grouped((t.device, t.dtype) for t in tensors).items():
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        values = torch._foreach_norm([tensors[i] for i in indices], 2, wide)
        for index, value in zip(indices, values, strict=True):
            result[index] = value
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
    widest = max((v.dtype for v in values), key=lambda dtype: dtype.itemsize)
    gathered = [v.to(values[0].device, widest, non_blocking=True) for v in values]
    return torch.linalg.vector_norm(torch.stack(gathered))


def perturb_(
    params: Sequence[Tensor],
    weights: Sequence[Tensor],
    direction: Sequence[Tensor],
    alphas: Sequence[float],
    norm: Tensor,
    eps: float,
) -> list[Tensor]:
    """Moves the live weights to w′ = w − α·∇h(w)/(‖∇h(w)‖ + ε).

    No temporary of the size of the weights is made: the live weights themselves hold the product
    until the unperturbed ones are added. Weights narrower than 32 bits are computed in float32,
    one tensor at a time, and rounded once.

    Args:
        params: Live weights, at w.
        weights: Copies of w, aligned with `params`.
        direction: −∇h(w), aligned with `params`.
        alphas: α of each tensor.
        norm: ‖∇h(w)‖ over *all* trainable parameters, 0-dimensional, on any device.
        eps: ε ≥ 0. A zero norm leaves the weights where they are, whatever ε.

    Returns:
        The norm of w′ − w of each tensor, as it came out after rounding.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> perturb_([w], [w.clone()], [-torch.tensor([3.0, 4.0])], [0.5], torch.tensor(5.0), 0.0)
        [tensor(0.5000)]
        >>> w
        tensor([0.7000, 1.6000])

    Source: Huang et al., ICLR 2025, Algorithm 1.
    """
    reached: list[Tensor] = list(params)
    kinds = ((p.device, p.dtype, alpha) for p, alpha in zip(params, alphas, strict=True))
    for (device, dtype, alpha), indices in _grouped(kinds).items():
        live = [params[i] for i in indices]
        w = [weights[i] for i in indices]
        towards = [direction[i] for i in indices]
        n = norm.to(device, non_blocking=True)
        scale = torch.where(n > 0, alpha / (n + eps), 0.0)

        if dtype.itemsize < 4:
            scale = scale.float().reshape(1)  # having a dimension, it widens the product
            lengths: list[Tensor] = []
            for p, w_i, towards_i in zip(live, w, towards, strict=True):
                p.copy_(torch.addcmul(w_i, towards_i, scale).view_as(p))
                lengths.append(torch.linalg.vector_norm(p.float().sub_(w_i)))
        else:
            torch._foreach_copy_(live, towards)
            torch._foreach_mul_(live, scale.to(dtype))
            torch._foreach_add_(live, w)
            torch._foreach_sub_(live, w)  # w′ − w as rounded, in place so that it costs no memory
            lengths = norms(live)
            torch._foreach_add_(live, w)

        for index, length in zip(indices, lengths, strict=True):
            reached[index] = length
    return reached


def restore_(params: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Copies the unperturbed weights back, bit for bit and into the same storage.

    Args:
        params: Live weights.
        weights: Copies made before the perturbation, aligned with `params`.
    """
    torch._foreach_copy_(list(params), list(weights))


def scale_(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiplies each tensor by its own number.

    Args:
        tensors: Dense tensors of any device and dtype.
        factors: One finite number for each.
    """
    for indices in _grouped((t.device, t.dtype) for t in tensors).values():
        torch._foreach_mul_([tensors[i] for i in indices], [factors[i] for i in indices])


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Adds to each tensor its counterpart.

    Args:
        tensors: Dense tensors of any device and dtype.
        others: Tensors of the same shapes, devices and dtypes.
    """
    for indices in _grouped((t.device, t.dtype) for t in tensors).values():
        torch._foreach_add_([tensors[i] for i in indices], [others[i] for i in indices])


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


def _grouped(kinds: Iterable[Kind]) -> dict[Kind, list[int]]:
    indices: dict[Kind, list[int]] = {}
    for index, kind in enumerate(kinds):
        indices.setdefault(kind, []).append(index)
    return indices
