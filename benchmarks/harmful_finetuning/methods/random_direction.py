"""A control for Booster: the simulated step goes in a random direction instead of the harmful one.

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α·u/‖u‖)),    u ~ N(0, I) over all trainable weights,

anew at each step, with one norm over all of them as in Booster. What Booster does better than this
comes from the direction of the harmful gradient and not from perturbing as such.

Not from the paper; λ = 5 and α = 0.1 are Booster's. Written out here, without `torch_booster`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate


class RandomDirection(Stage):
    """Trains on `batches` with Booster's regulariser along a random direction.

    The direction comes from torch's global generator. Dropout masks are those of the first harmful
    pass in the second too, as in Booster.

    Args:
        model: See `Stage`.
        optimizer: See `Stage`.
        lam: λ ≥ 0, regulariser intensity; 0 is SFT.
        alpha: α ≥ 0, length of the random step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, lam: float = 5.0, alpha: float = 0.1
    ) -> None:
        super().__init__(model, optimizer)
        self.lam = lam
        self.alpha = alpha
        self.seen: dict[str, Tensor] = {}

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """The regulariser first, then ∇f(w). Returns f(w)."""
        self.regularize(next(auxiliary))
        return backpropagate(self.model, next(batches))

    @torch.no_grad()
    def regularize(self, harmful: dict[str, Tensor]) -> None:
        """Adds λ·(∇h(w) − ∇h(w − α·u/‖u‖)) to `.grad`."""
        params = self.trainable()
        w = [p.clone() for p in params]
        u = [torch.randn_like(p) for p in params]
        norm = get_total_norm(u)

        with torch.random.fork_rng():
            h, g = self.gradient(harmful, params)
        try:
            for p, u_p in zip(params, u, strict=True):
                p.sub_(self.alpha * u_p / norm)
            h_prime, q = self.gradient(harmful, params)
        finally:
            for p, w_p in zip(params, w, strict=True):
                p.copy_(w_p)

        for p, g_p, q_p in zip(params, g, q, strict=True):
            regularizer = self.lam * (g_p - q_p)
            p.grad = regularizer if p.grad is None else p.grad + regularizer
        self.seen = {
            "harmful_loss": h,
            "perturbed_harmful_loss": h_prime,
            "harmful_loss_drop": h - h_prime,
            "harmful_grad_norm": get_total_norm(g),
        }

    @torch.enable_grad()
    def gradient(
        self, batch: dict[str, Tensor], params: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss on `batch` and its gradient at the present weights, outside `.grad`."""
        loss = self.model(**batch).loss
        gradients = torch.autograd.grad(loss, params, materialize_grads=True, allow_unused=True)
        return loss.detach(), list(gradients)

    def diagnostics(self) -> dict[str, float]:
        """As Booster's, of the last step."""
        return {name: x.item() for name, x in self.seen.items()}
