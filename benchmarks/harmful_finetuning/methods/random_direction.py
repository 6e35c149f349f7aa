"""A control for Booster: the simulated step goes in a random direction instead of the harmful one.

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α·u/‖u‖)),    u ~ N(0, I) over all trainable weights,

anew at each step, with one norm over all of them as in Booster. What Booster does better than this
comes from the direction of the harmful gradient and not from perturbing as such.

Not from the paper; λ = 5 and α = 0.1 are Booster's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks.harmful_finetuning.methods.perturbed import Perturbed


class RandomDirection(Perturbed):
    """Trains on `batches` with Booster's regulariser along a random direction.

    The direction comes from torch's global generator.
    """

    def regularize(self, harmful: dict[str, Tensor]) -> None:
        """Adds λ·(∇h(w) − ∇h(w − α·u/‖u‖)) to `.grad`."""
        # Drawn between the harmful passes, u would change the dropout masks of the second.
        self.u = [torch.randn_like(p) for p in self.trainable()]
        super().regularize(harmful)

    def displacement(self, gradient: list[Tensor]) -> list[Tensor]:
        """−α·u/‖u‖, whatever the gradient is."""
        norm = get_total_norm(self.u)
        return [-self.alpha * u_p / norm for u_p in self.u]
