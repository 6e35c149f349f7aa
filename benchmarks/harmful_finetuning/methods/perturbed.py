"""What the comparisons with Booster share, above all those that only perturb in another way.

    g = ∇f(w) + λ·(∇h(w) − ∇h(w′)),

with alignment loss f, both harmful gradients ∇h on one batch, and a w′ that each of them chooses.
Three forward and backward passes a step. Written out here, without `torch_booster`.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate


class Regularized(Stage):
    """Trains on `batches` with a regulariser of a harmful batch that a subclass defines.

    Args:
        model: See `Stage`.
        optimizer: See `Stage`.
        lam: λ ≥ 0, regulariser intensity; 0 is SFT.
        alpha: α ≥ 0, length of the simulated harmful step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, lam: float = 5.0, alpha: float = 0.1
    ) -> None:
        super().__init__(model, optimizer)
        self.lam = lam
        self.alpha = alpha
        self.seen: dict[str, Tensor] = {}

    @abstractmethod
    def regularize(self, harmful: dict[str, Tensor]) -> None:
        """Adds the regulariser's gradient to `.grad` and tells `see` of it."""

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """The regulariser first, then ∇f(w). Returns f(w)."""
        self.regularize(next(auxiliary))
        return backpropagate(self.model, next(batches))

    def see(self, h: Tensor, h_prime: Tensor, norm: Tensor) -> None:
        """Keeps h(w), h(w′) and ‖∇h(w)‖ for the diagnostics."""
        self.seen = {
            "harmful_loss": h,
            "perturbed_harmful_loss": h_prime,
            "harmful_loss_drop": h - h_prime,
            "harmful_grad_norm": norm,
        }

    def diagnostics(self) -> dict[str, float]:
        """As Booster's, of the last step."""
        return {name: x.item() for name, x in self.seen.items()}


class Perturbed(Regularized):
    """Trains with Booster's regulariser at weights that a subclass displaces.

    Dropout masks are those of the first harmful pass in the second too, as in Booster.
    """

    @abstractmethod
    def displacement(self, gradient: list[Tensor]) -> list[Tensor]:
        """w′ − w of each parameter, of length α together.

        Args:
            gradient: ∇h(w) of each, zero where h does not depend on it.
        """

    @torch.no_grad()
    def regularize(self, harmful: dict[str, Tensor]) -> None:
        """Adds λ·(∇h(w) − ∇h(w′)) to `.grad`."""
        params = self.trainable()
        w = [p.clone() for p in params]

        with torch.random.fork_rng():
            h, g = self.gradient(harmful, params)
        try:
            for p, d_p in zip(params, self.displacement(g), strict=True):
                p.add_(d_p)
            h_prime, q = self.gradient(harmful, params)
        finally:
            for p, w_p in zip(params, w, strict=True):
                p.copy_(w_p)

        for p, g_p, q_p in zip(params, g, q, strict=True):
            regularizer = self.lam * (g_p - q_p)
            p.grad = regularizer if p.grad is None else p.grad + regularizer
        self.see(h, h_prime, get_total_norm(g))

    @torch.enable_grad()
    def gradient(
        self, batch: dict[str, Tensor], params: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss on `batch` and its gradient at the present weights, outside `.grad`."""
        loss = self.model(**batch).loss
        gradients = torch.autograd.grad(loss, params, materialize_grads=True, allow_unused=True)
        return loss.detach(), list(gradients)
