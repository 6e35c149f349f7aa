"""Booster: keeps a harmful step from lowering the harmful loss by much.

With alignment loss f and harmful loss h,

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α·∇h(w)/(‖∇h(w)‖ + 1e-7))),

both harmful gradients on one batch. Three forward and backward passes a step.

Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via
Attenuating Harmful Perturbation", ICLR 2025, arXiv 2409.01586, Algorithm 1, from which λ = 5 and
α = 0.1 are taken. The implementation is `torch_booster`, used as any loop would use it.

Two variations, not from the paper:

- λ·min(1, t/T) in place of λ at the steps t = 0, 1, 2, … An unaligned model complies: its harmful
  loss is at the bottom, where a further step gains nothing, and the regulariser is content with it.
  With the full λ from the first step on it can hold the model there, so that refusals are learned
  in the first words alone. This lets the harmful loss rise first.
- The regulariser at every k-th step only, k times as heavy: 1 + 2/k passes a step.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate
from torch_booster import BoosterOptimizer


class Booster(Stage):
    """Trains on `batches` with Booster's regulariser of a harmful batch.

    Args:
        model: See `Stage`.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity, averaged over the steps; 0 is SFT.
        alpha: α ≥ 0, length of the simulated harmful step.
        warmup: T, steps until the full λ; 0 is the full λ from the first step on.
        every: k ≥ 1; 1 is a regulariser at each step.
    """

    optimizer: BoosterOptimizer

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        warmup: int = 0,
        every: int = 1,
    ) -> None:
        super().__init__(model, BoosterOptimizer(optimizer, every * lam, alpha))
        self.lam, self.warmup, self.every, self.steps = every * lam, warmup, every, 0

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """The regulariser first, then ∇f(w). Returns f(w)."""
        self.regularize(auxiliary)
        return backpropagate(self.model, next(batches))

    def regularize(self, auxiliary: Batches) -> None:
        """Adds λ·(∇h(w) − ∇h(w′)) of the next harmful batch to `.grad`."""
        # By hand until `BoosterOptimizer` takes a warm-up and a distance of its own.
        if self.warmup:
            self.optimizer.lam = self.lam * min(1.0, self.steps / self.warmup)
        if self.steps % self.every == 0:
            harmful = next(auxiliary)
            self.optimizer.regularize(lambda: backpropagate(self.model, harmful))
        self.steps += 1

    def diagnostics(self) -> dict[str, float]:
        """`torch_booster.Diagnostics` of the last step; empty while λ is 0."""
        seen = self.optimizer.diagnostics
        return {} if seen is None else {name: x.item() for name, x in seen._asdict().items()}
