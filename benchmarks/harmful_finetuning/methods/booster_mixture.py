"""Booster with a simulated step of another length each time.

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α_t·∇h(w)/‖∇h(w)‖)),    log α_t uniform on log α ± log s

so that the harmful loss is to fall short at every distance of a range and not at one alone.

Not from the paper: an attempt to leave an attacker who takes larger steps no gap to step over.
"""

from __future__ import annotations

import math
import random
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.stage import Batches


class BoosterMixture(Booster):
    """Trains as Booster does, with α drawn anew for each step.

    Args:
        model: See `Stage`.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity; 0 is SFT.
        alpha: α ≥ 0, the middle of the lengths.
        spread: s ≥ 1, the longest and the shortest length are α·s and α/s; 1 is Booster.
        norm: "global" or "tensor".
        warmup: T, steps until the full λ.
        delay: D, steps without a regulariser.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        spread: float = 4.0,
        norm: Any = "global",
        warmup: int = 0,
        delay: int = 0,
    ) -> None:
        super().__init__(
            model, optimizer, lam=lam, alpha=alpha, norm=norm, warmup=warmup, delay=delay
        )
        self.alpha, self.spread = alpha, spread
        self.draws = random.Random(0)

    def regularize(self, auxiliary: Batches) -> None:
        """Draws α, then adds the regulariser to `.grad`."""
        exponent = self.draws.uniform(-1.0, 1.0)
        self.optimizer.alpha = self.alpha * math.exp(exponent * math.log(self.spread))
        super().regularize(auxiliary)
