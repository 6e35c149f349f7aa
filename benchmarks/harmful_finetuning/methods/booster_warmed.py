"""Booster whose intensity grows from nothing over the first steps of the alignment.

    g_t = ∇f(w_t) + λ·min(1, t/T)·(∇h(w_t) − ∇h(w_t′)),    t = 0, 1, 2, …

An unaligned model complies: its harmful loss is at the bottom, where a further step gains nothing,
and the regulariser is content with it. With the full λ from the first step on it can hold the model
there, so that refusals are learned in the first words alone. This lets the harmful loss rise first.

Not from the paper: a way around that easy way out. The user's own loop sets `optimizer.lam`.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.stage import Batches


class BoosterWarmed(Booster):
    """Trains as Booster does, with a linear warm-up of λ.

    Args:
        model: See `Stage`.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity after the warm-up; 0 is SFT.
        alpha: α ≥ 0, length of the simulated harmful step.
        warmup: T ≥ 1, steps until the full λ; with 1 the first step alone lacks the regulariser.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        warmup: int = 500,
    ) -> None:
        super().__init__(model, optimizer, lam=lam, alpha=alpha)
        self.lam = lam
        self.warmup = warmup
        self.steps = 0

    def regularize(self, auxiliary: Batches) -> None:
        """Adds λ·min(1, t/T) of the regulariser to `.grad`."""
        self.optimizer.lam = self.lam * min(1.0, self.steps / self.warmup)
        super().regularize(auxiliary)
        self.steps += 1
