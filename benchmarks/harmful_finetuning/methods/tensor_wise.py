"""A comparison for Booster: the simulated step normalises each weight tensor's gradient by itself.

    g = ∇f(w) + λ·(∇h(w) − ∇h(w′)),    w′ᵢ = wᵢ − α/√n · ∇ᵢh(w)/(‖∇ᵢh(w)‖ + 1e-7)

for each weight tensor i, where n of them have a gradient that is not zero. The whole displacement
has length α as Booster's has, but every tensor takes the same share of it, where Booster leaves
most of it to the tensors of the largest gradients.

Not from the paper; λ = 5 and α = 0.1 are Booster's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harmful_finetuning.methods.perturbed import Perturbed


class TensorWise(Perturbed):
    """Trains on `batches` with Booster's regulariser along gradients normalised one by one."""

    def displacement(self, gradient: list[Tensor]) -> list[Tensor]:
        """−α/√n · ∇ᵢh/(‖∇ᵢh‖ + 1e-7) of each tensor."""
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradient])
        # Zero where unused, and in LoRA's first matrices while the second ones are zero.
        n = norms.count_nonzero().clamp(min=1).to(norms.dtype)
        return [
            -self.alpha / n.sqrt() * g / (norm + 1e-7)
            for g, norm in zip(gradient, norms, strict=True)
        ]
