"""The Booster gradient from its formula, on clones, sharing no line with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Loss", "Wanted", "gradients", "total", "wanted"]

Weights = dict[str, Tensor]
Loss = Callable[[Callable[..., Any]], Tensor]
"""Takes the model, or what may be called in its place, and returns the loss."""


class Wanted(NamedTuple):
    """What a step ought to leave in `.grad`, and how much of it is the regulariser."""

    gradient: Weights
    regularizer: Weights

    def missed_by(self, made: Mapping[str, Tensor | None]) -> float:
        """Distance of a gradient from the wanted one, in units of the regulariser's length.

        0 is right, 1 what a step without a regulariser has, and 2 one of the wrong sign.
        """
        gap = {
            name: wide(g) - (0.0 if (m := made[name]) is None else wide(m).to(g.device))
            for name, g in self.gradient.items()
        }
        return total(gap) / total(self.regularizer)


def wanted(
    model: nn.Module, f: Loss, h: Loss, lam: float, alpha: float, norm: str, eps: float = 1e-7
) -> Wanted:
    """∇f(w) + λ·(∇h(w) − ∇h(w′)), where w′ = w − α·∇h(w)/(‖∇h(w)‖ + ε).

    With the norm "tensor" each of the n tensors that h reaches is divided by its own length, and
    takes a share of 1/√n. Lengths are taken in float64, and w′ is rounded once.
    """
    w = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    at_w = gradients(model, h, w)
    lengths = {name: total({name: g}) for name, g in at_w.items()}
    whole, reached = total(at_w), sum(length > 0 for length in lengths.values())
    divisors = {
        name: reached**0.5 * (own + eps) if norm == "tensor" else whole + eps
        for name, own in lengths.items()
    }
    moved = {n: (wide(p) - alpha * wide(at_w[n]) / divisors[n]).to(p.dtype) for n, p in w.items()}
    there = gradients(model, h, moved)
    regularizer = {name: lam * (wide(g) - wide(there[name])) for name, g in at_w.items()}
    aligned = gradients(model, f, w)
    return Wanted({n: wide(g) + regularizer[n] for n, g in aligned.items()}, regularizer)


def gradients(model: nn.Module, loss: Loss, at: Weights) -> Weights:
    """The gradient of a loss at given weights, zero where it does not depend on one."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in at.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, leaves, args, kwargs)

    made = torch.autograd.grad(loss(call), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), made, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


def total(values: Weights) -> float:
    """The L2 norm over all tensors."""
    return sum(float(wide(value).square().sum()) for value in values.values()) ** 0.5


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64."""
    return tensor.detach().double()
