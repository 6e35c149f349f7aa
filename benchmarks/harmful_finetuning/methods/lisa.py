"""Lisa: fine-tuning in two states, on alignment data and on the user's, held near each other.

In each state, with f the cross-entropy of that state's data,

    g = ∇f(w) + ρ·(w − w_other),

the gradient of f(w) + (ρ/2)·‖w − w_other‖², where w_other are the weights with which the other
state ended.

Source: Huang et al., "Lisa: Lazy Safety Alignment for Large Language Models against Harmful
Fine-tuning Attack", NeurIPS 2024, arXiv 2405.18641, and its code, git-disl/Lisa, which is followed
in what the formula leaves open:

- The alignment state comes first, unless it has no steps.
- Until the first switch w_other are the weights at the start of the stage.
- The proximal term is left out in the first 10 % of the stage's steps and the one after them.

The code draws a batch of the user's data on alignment steps too and drops it; here a state draws
only what it uses. ρ = 0.01 and 100 alignment steps to 900 user's steps are those of Booster's
scripts; 2000 steps are 20 epochs of 1000 samples in batches of 10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate


class Lisa(Stage):
    """Trains on `auxiliary` (alignment data) and `batches` (the user's data) by turns.

    Args:
        model: See `Stage`.
        optimizer: See `Stage`.
        rho: ρ ≥ 0, intensity of the proximal term.
        alignment_steps: Steps of each alignment state; 0 is never to leave the user's data, which
            with ρ = 0 is SFT.
        user_steps: Steps of each state on the user's data; 0 is never to leave the alignment data.
        steps: Steps of the whole stage.

    Raises:
        ValueError: Both states have no steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rho: float = 0.01,
        alignment_steps: int = 100,
        user_steps: int = 900,
        steps: int = 2000,
    ) -> None:
        super().__init__(model, optimizer)
        if alignment_steps + user_steps == 0:
            raise ValueError("alignment_steps and user_steps are both 0: one state needs steps.")
        self.rho = rho
        self.alignment_steps = alignment_steps
        self.user_steps = user_steps
        self.steps = steps
        self.step = 0
        self.w_other = self.weights()

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """Makes g = ∇f(w) + ρ·(w − w_other) and counts a step. Returns f(w)."""
        if self.step > 0 and self.aligns(self.step) != self.aligns(self.step - 1):
            self.w_other = self.weights()
        loss = backpropagate(self.model, next(auxiliary if self.aligns(self.step) else batches))
        if self.rho > 0 and self.step > 0.1 * self.steps:
            self.add_proximal_gradient()
        self.step += 1
        return loss

    def aligns(self, step: int) -> bool:
        """Whether `step`, counted from 0, belongs to the alignment state."""
        return step % (self.alignment_steps + self.user_steps) < self.alignment_steps

    @torch.no_grad()
    def add_proximal_gradient(self) -> None:
        """Adds ρ·(w − w_other) to `.grad`."""
        for p, other in zip(self.trainable(), self.w_other, strict=True):
            if p.grad is not None:  # else it is never stepped, and p is still w_other
                p.grad.add_(p - other, alpha=self.rho)

    def weights(self) -> list[Tensor]:
        """A copy of the trainable weights."""
        return [p.detach().clone() for p in self.trainable()]
