"""The oracle: a slow Booster step on cloned tensors, sharing no line with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Sequence[Tensor]], Tensor]  # parameters -> scalar


def booster_gradient(
    f: Loss,
    h: Loss,
    params: Sequence[Tensor],
    lam: float | Sequence[float],
    alpha: float | Sequence[float],
    eps: float = 1e-7,
    norm: str = "global",
) -> list[Tensor | None]:
    """∇f(w) + λ·(∇h(w) − ∇h(w − α·∇h(w)/(‖∇h(w)‖ + ε))), each gradient by autograd.grad on clones.

    With the norm "tensor" w′ᵢ = wᵢ − (α/√n)·gᵢ/(‖gᵢ‖ + ε) over the n tensors whose gradient is not
    zero. None where neither f nor h depends on a parameter.
    """
    lams = [lam] * len(params) if isinstance(lam, (int, float)) else lam
    alphas = [alpha] * len(params) if isinstance(alpha, (int, float)) else alpha
    w = [p.detach().clone() for p in params]
    g_f = _gradient(f, w)
    g_h = _gradient(h, w)
    own = [0.0 if g is None else float((g.abs().double() ** 2).sum()) ** 0.5 for g in g_h]
    n = sum(length > 0 for length in own)
    whole = sum(length**2 for length in own) ** 0.5
    divisors = [n**0.5 * (length + eps) if norm == "tensor" else whole + eps for length in own]
    w_prime = [
        p if g is None or not g.any() else p - a * g / divisor
        for p, g, a, divisor in zip(w, g_h, alphas, divisors, strict=True)
    ]
    q = _gradient(h, w_prime)
    return [
        None if all(g is None for g in (gf, gh, gq)) else _zero(gf) + lm * (_zero(gh) - _zero(gq))
        for gf, gh, gq, lm in zip(g_f, g_h, q, lams, strict=True)
    ]


def _gradient(loss: Loss, at: Sequence[Tensor]) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_() for t in at]
    return list(torch.autograd.grad(loss(leaves), leaves, allow_unused=True))


def _zero(grad: Tensor | None) -> Tensor | float:
    return 0.0 if grad is None else grad
