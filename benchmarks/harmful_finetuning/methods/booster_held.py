"""Booster with a regulariser that is computed at every k-th step and held in between.

    g_t = ∇f(w_t) + λ·(∇h(w_s) − ∇h(w_s′)),    s = k·⌊t/k⌋

1 + 2/k forward and backward passes a step, and one more copy of the trainable weights' size.

Not from the paper: an attempt to spend less than its three passes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.stage import Batches


class BoosterHeld(Booster):
    """Trains as Booster does, with a new regulariser at every k-th step only.

    Args:
        model: See `Stage`.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity; 0 is SFT.
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
        super().__init__(model, optimizer, lam=lam, alpha=alpha)
        self.lam = lam
        self.hold = every
        self.drawn = 0
        self.held: list[Tensor | None] = []

    def regularize(self, auxiliary: Batches) -> None:
        """Adds the regulariser to `.grad`, a new one where the step's number divides by k."""
        params = self.trainable()
        self.optimizer.lam = 0.0 if self.drawn % self.hold else self.lam  # held ones come by hand
        if self.drawn % self.hold == 0:
            before = [None if p.grad is None else p.grad.clone() for p in params]
            super().regularize(auxiliary)
            self.held = [
                None if p.grad is None else p.grad.clone() if b is None else p.grad - b
                for p, b in zip(params, before, strict=True)
            ]
        else:
            for p, held in zip(params, self.held, strict=True):
                if held is not None:
                    p.grad = held.clone() if p.grad is None else p.grad.add_(held)
        self.drawn += 1
