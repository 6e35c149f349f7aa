"""Booster with a regulariser at every k-th step only, k times as heavy.

    g_t = ∇f(w_t) + k·λ·(∇h(w_t) − ∇h(w_t′))    where k divides t,    ∇f(w_t)    elsewhere

1 + 2/k forward and backward passes a step, and no more memory than Booster.

Not from the paper: an attempt to spend less than its three passes.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.stage import Batches


class BoosterWeighted(Booster):
    """Trains as Booster does at every k-th step, and as SFT in between.

    Args:
        model: See `Stage`.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity, averaged over the steps; 0 is SFT.
        alpha: α ≥ 0, length of the simulated harmful step.
        every: k ≥ 1; 1 is Booster.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        every: int = 4,
    ) -> None:
        super().__init__(model, optimizer, lam=every * lam, alpha=alpha)
        self.every = every
        self.steps = 0

    def regularize(self, auxiliary: Batches) -> None:
        """Adds k times the regulariser to `.grad` where the step's number divides by k."""
        if self.steps % self.every == 0:
            super().regularize(auxiliary)
        self.steps += 1
