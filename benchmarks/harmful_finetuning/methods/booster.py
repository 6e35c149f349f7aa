"""Booster: keeps a harmful step from lowering the harmful loss by much.

With alignment loss f and harmful loss h,

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α·∇h(w)/(‖∇h(w)‖ + 1e-7))),

both harmful gradients on one batch. Three forward and backward passes a step.

Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via
Attenuating Harmful Perturbation", ICLR 2025, arXiv 2409.01586, Algorithm 1, from which λ = 5 and
α = 0.1 are taken. The implementation is `torch_booster`, used as any loop would use it.
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
        lam: λ ≥ 0, regulariser intensity; 0 is SFT.
        alpha: α ≥ 0, length of the simulated harmful step.
    """

    optimizer: BoosterOptimizer

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, lam: float = 5.0, alpha: float = 0.1
    ) -> None:
        super().__init__(model, BoosterOptimizer(optimizer, lam, alpha))

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """The regulariser first, then ∇f(w). Returns f(w)."""
        self.regularize(auxiliary)
        return backpropagate(self.model, next(batches))

    def regularize(self, auxiliary: Batches) -> None:
        """Adds λ·(∇h(w) − ∇h(w′)) of the next harmful batch to `.grad`."""
        harmful = next(auxiliary)
        self.optimizer.regularize(lambda: backpropagate(self.model, harmful))

    def diagnostics(self) -> dict[str, float]:
        """`torch_booster.Diagnostics` of the last step; empty while λ is 0."""
        seen = self.optimizer.diagnostics
        return {} if seen is None else {name: x.item() for name, x in seen._asdict().items()}
