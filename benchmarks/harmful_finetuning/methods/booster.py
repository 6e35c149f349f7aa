"""Booster: keeps a harmful step from lowering the harmful loss by much.

With alignment loss f and harmful loss h,

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α·∇h(w)/(‖∇h(w)‖ + 1e-7))),

both harmful gradients on one batch. Three forward and backward passes a step.

Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via
Attenuating Harmful Perturbation", ICLR 2025, arXiv 2409.01586, Algorithm 1, from which λ = 5 and
α = 0.1 are taken. The implementation is `torch_booster`, used as any loop would use it.

Variations, not from the paper, all of them arguments of `BoosterOptimizer`:

- λ·min(1, (t − D)/T) in place of λ at the steps t = D, D + 1, …, and none before. An unaligned
  model complies: its harmful loss is at the bottom, where a further step gains nothing, and the
  regulariser is content with it. With the full λ from the first step on it can hold the model
  there, so that refusals are learned in the first words alone. This lets the harmful loss rise
  first.
- A norm for each tensor: w′ᵢ = wᵢ − α/√n · ∇ᵢh(w)/(‖∇ᵢh(w)‖ + 1e-7). The simulated step has
  length α all the same, but every tensor takes the same share of it.
- α as the radius of a trust region, halved where the harmful loss falls by less than a quarter of
  what its gradient promises, or rises; else it grows back by 5 % a step.
- The regulariser at every k-th step only, k times as heavy: 1 + 2/k passes a step.
"""

from __future__ import annotations

from typing import Literal

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
        norm: "global" or "tensor".
        warmup: T, steps until the full λ; 0 is the full λ from step D on.
        delay: D, steps without a regulariser.
        every: k ≥ 1; 1 is a regulariser at each step.
        trust_region: Whether α adapts.
    """

    optimizer: BoosterOptimizer

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        norm: Literal["global", "tensor"] = "global",
        warmup: int = 0,
        delay: int = 0,
        every: int = 1,
        trust_region: bool = False,
    ) -> None:
        wrapped = BoosterOptimizer(
            optimizer,
            lam,
            alpha,
            norm=norm,
            lam_warmup_steps=warmup,
            lam_delay_steps=delay,
            every=every,
            trust_region=trust_region,
            self_check=False,  # passes are counted, and the loop is known
        )
        super().__init__(model, wrapped)

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """The regulariser first, then ∇f(w). Returns f(w)."""
        self.regularize(auxiliary)
        return backpropagate(self.model, next(batches))

    def regularize(self, auxiliary: Batches) -> None:
        """Adds λ·(∇h(w) − ∇h(w′)) of the next harmful batch to `.grad`."""
        if self.optimizer.is_due():
            harmful = next(auxiliary)
            self.optimizer.regularize(lambda: backpropagate(self.model, harmful))

    def diagnostics(self) -> dict[str, float]:
        """`torch_booster.Diagnostics` of the last step; empty while λ is 0."""
        return self.optimizer.read_diagnostics()
