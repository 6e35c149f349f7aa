"""Multi-tensor arithmetic of the Booster step: how far to go, perturb, restore, measure.

Everything works in place on plain (local) tensors, keeps the storage of the weights, takes scales
as tensors on the device, and so never waits for an accelerator, unless some of the weights are on
the CPU. Mixed devices and dtypes are sorted into multi-tensor calls of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

__all__ = [
    "LEAST_TRUSTED",
    "add_",
    "copying",
    "entries",
    "filled",
    "lam_at",
    "moved_fraction",
    "moved_to",
    "norms",
    "perturb_",
    "scale_",
    "step_sizes",
    "subtract_",
    "trusted",
]


def lam_at(
    step: int, lam: float, warmup_steps: int = 0, delay_steps: int = 0, every: int = 1
) -> float:
    """λ in force at step t: k·λ·min(1, (t − D)/T) where k divides t and t ≥ D, else 0.

    Args:
        step: t ≥ 0, optimizer steps taken before.
        lam: λ ≥ 0.
        warmup_steps: T ≥ 0; 0 is the whole λ from step D on.
        delay_steps: D ≥ 0.
        every: k ≥ 1; the regulariser comes at every k-th step, k times as heavy.

    Example:
        >>> [lam_at(t, 5.0, warmup_steps=4) for t in range(6)]
        [0.0, 1.25, 2.5, 3.75, 5.0, 5.0]
        >>> [lam_at(t, 5.0, delay_steps=3, every=2) for t in range(6)]
        [0.0, 0.0, 0.0, 0.0, 10.0, 0.0]
    """
    after = step - delay_steps
    if step % every or after < 0:
        return 0.0
    return every * lam * (min(1.0, after / warmup_steps) if warmup_steps else 1.0)


LEAST_TRUSTED = 2.0**-10


def trusted(fraction: float, drop_ratio: float) -> float:
    """The fraction of α that a trust region allows next, after what the last step of it saw.

    Half of it, and no less than 2⁻¹⁰, where the harmful loss fell by less than a quarter of what
    its gradient promises, or rose; else 5 % more, up to the whole α. NaN, which promises nothing,
    leaves it.

    Args:
        fraction: In (0, 1]; what was allowed so far.
        drop_ratio: (h(w) − h(w′)) over its first order.

    Example:
        >>> trusted(1.0, 0.9), trusted(1.0, -3.0), trusted(0.5, 0.9)
        (1.0, 0.5, 0.525)

    Source: after the radius of trust-region methods (Nocedal & Wright, Numerical Optimization,
    algorithm 4.1). It grows at every good step, and slowly, since it is to stay as long as it can.
    """
    if drop_ratio < 0.25:
        return max(LEAST_TRUSTED, fraction / 2)
    return min(1.0, 1.05 * fraction) if drop_ratio >= 0.25 else fraction


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, accumulated in float32, or in float64 for float64 tensors.

    Example:
        >>> norms([torch.ones(4, dtype=torch.bfloat16), torch.zeros(0)])
        [tensor(2.), tensor(0.)]
    """
    result = list(tensors)
    for indices, (alike,) in _alike(tensors):
        wide = torch.float64 if alike[0].dtype is torch.float64 else torch.float32
        _put(result, indices, torch._foreach_norm(alike, 2, wide))
    return result


def step_sizes(lengths: Tensor, alphas: Sequence[float], norm: str, eps: float) -> Tensor:
    """sᵢ of the simulated step w′ᵢ = wᵢ − sᵢ·gᵢ, whose length is α in either norm.

    With one norm over all tensors sᵢ = α/(‖g‖ + ε). With a norm for each of the n tensors whose
    gradient is not zero sᵢ = α/(√n·(‖gᵢ‖ + ε)).

    Args:
        lengths: ‖gᵢ‖ of the whole tensors, of shape (tensors,).
        alphas: α of each tensor.
        norm: "global" or "tensor".
        eps: ε ≥ 0. Where a norm is zero the step is, whatever ε.

    Returns:
        One number for each tensor, or a 0-dimensional one where it is the same for all.

    Example:
        >>> lengths = torch.tensor([3.0, 4.0])
        >>> step_sizes(lengths, [0.5, 0.5], "global", 0.0)
        tensor(0.1000)
        >>> step_sizes(lengths, [0.5, 0.5], "tensor", 0.0) * lengths * 2**0.5
        tensor([0.5000, 0.5000])

    Source: Huang et al., ICLR 2025, Algorithm 1, for the first; the second is not from the paper.
    """
    length, share = torch.linalg.vector_norm(lengths), 1.0
    if norm == "tensor":
        length, share = lengths, lengths.count_nonzero().to(lengths.dtype).sqrt()
    of = {a: torch.where(length > 0, a / (share * (length + eps)), 0.0) for a in {*alphas}}
    if len(of) == 1:
        return of.popitem()[1]
    whole = {a: s.expand_as(lengths).unbind() for a, s in of.items()}
    return torch.stack([whole[a][i] for i, a in enumerate(alphas)])


def perturb_(
    params: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor], sizes: Tensor
) -> list[Tensor] | None:
    """Moves the live weights to w′ᵢ = wᵢ − sᵢ·gᵢ.

    No temporary of the size of the weights is made. Weights narrower than 32 bits are computed in
    float32, one tensor at a time, and rounded once.

    Args:
        params: Live weights, at w.
        weights: Copies of w, aligned with `params`.
        grads: Gradients, aligned with `params`.
        sizes: One number for each, or one for all.

    Returns:
        The norm of each w′ᵢ − wᵢ as it came out, where rounding may have eaten it; else None.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> perturb_([w], [w.clone()], [torch.tensor([3.0, 4.0])], torch.tensor(0.1))
        >>> w
        tensor([0.7000, 1.6000])
    """
    for indices, (live, w) in _alike(params, weights):
        narrow = live[0].dtype.itemsize < 4
        s = moved_to(sizes, live[0].device, torch.float32 if narrow else live[0].dtype)
        parts = s.expand(len(params)).unbind()
        each = [parts[i] for i in indices]
        if narrow:
            for p, at, i, s_i in zip(live, w, indices, each, strict=True):
                p.copy_(torch.addcmul(at.float(), grads[i].to(s.dtype), s_i, value=-1))
            continue
        g = [grads[i].to(s.dtype) if grads[i].dtype is not s.dtype else grads[i] for i in indices]
        if sizes.ndim or live[0].device.type == "cpu":
            torch._foreach_addcmul_(live, g, each, -1)
        else:  # three launches, where the line above would make one for each tensor
            torch._foreach_copy_(live, g)
            torch._foreach_mul_(live, -s)
            torch._foreach_add_(live, w)
    if all(p.dtype.itemsize >= 4 for p in params):
        return None
    return [torch.linalg.vector_norm(p.float() - w) for p, w in zip(params, weights, strict=True)]


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
    """Multiplies each tensor by its own finite number."""
    for indices, (alike,) in _alike(tensors):
        torch._foreach_mul_(alike, [factors[i] for i in indices])


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Adds to each tensor its counterpart of the same shape, device and dtype."""
    for _, (into, added) in _alike(tensors, others):
        torch._foreach_add_(into, added)


def subtract_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Subtracts from each tensor its counterpart of the same shape, device and dtype."""
    for _, (into, taken) in _alike(tensors, others):
        torch._foreach_sub_(into, taken)


def moved_fraction(
    params: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[float, torch.dtype] | None:
    """Share of the weights narrower than 32 bits that a perturbation really moved.

    Only elements with a nonzero gradient count. Waits for the device.

    Args:
        params: Live weights, at w′.
        weights: Copies of w.
        grads: ∇h(w).

    Returns:
        The share, between 0 and 1, and the dtype; None where there are no such weights.
    """
    moved = wanted = 0
    narrow: torch.dtype | None = None
    for p, w, g in zip(params, weights, grads, strict=True):
        if p.dtype.itemsize < 4:
            narrow = p.dtype
            pushed = g != 0
            wanted += int(pushed.sum())
            moved += int(((p != w) & pushed).sum())
    return (moved / wanted, narrow) if narrow is not None and wanted else None


def moved_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor in another place and dtype; waits only for what the CPU is about to read.

    Without waiting a copy from an accelerator to the CPU holds garbage until it has arrived.
    """
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def filled(pattern: Sequence[object], values: Iterable[Tensor]) -> list[Tensor | None]:
    """Values in the places where a pattern holds something, None where it holds None.

    Example:
        >>> filled([1, None, 2], torch.tensor([3.0, 4.0]))
        [tensor(3.), None, tensor(4.)]
    """
    rest = iter(values)
    return [None if x is None else next(rest) for x in pattern]


def entries(sizes: Tensor, pattern: Sequence[object]) -> Tensor:
    """The entries of a vector where a pattern holds something; a scalar is one for all."""
    if sizes.ndim == 0 or all(x is not None for x in pattern):
        return sizes
    each = zip(sizes.unbind(), pattern, strict=True)
    return torch.stack([size for size, x in each if x is not None])


def _alike(*lists: Sequence[Tensor]) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Aligned tensors sorted into those of one device and dtype, with their indices."""
    if lists[0]:
        parts: Any = [list(tensors) for tensors in lists]
        for group, indices in _group_tensors_by_device_and_dtype(parts, True).values():
            yield list(indices), group  # pyright: ignore[reportReturnType]


def _put(into: list[Tensor], indices: Sequence[int], values: Sequence[Tensor]) -> None:
    for index, value in zip(indices, values, strict=True):
        into[index] = value
