"""Booster for a LoRA that will be merged: the harmful step is simulated in the weights below it.

With the adapter's weights w and the frozen weights v that it will be merged into,

    g = ∇f(w) + λ·(∇h(w, v) − ∇h(w, v − α·∇ᵥh/(‖∇ᵥh‖ + 1e-7))),    gradients by w.

Who gets the merged model trains v. Booster's own step moves w, whose directions are few, and none
where a second adapter starts.

Not from the paper.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.booster import Booster
from torch_booster.integrations.peft import MergedOffsets, merged_weights


class BoosterMerged(Booster):
    """Trains an adapter as Booster does, with the perturbation in the weights below it.

    Args:
        model: See `Stage`; it has a LoRA.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity; 0 is SFT.
        alpha: α ≥ 0, length of the simulated harmful step.
        norm: "global" or "tensor".
        warmup: T, steps until the full λ.
        delay: D, steps without a regulariser.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 20.0,
        alpha: float = 0.05,
        norm: Any = "tensor",
        warmup: int = 0,
        delay: int = 0,
    ) -> None:
        super().__init__(
            model, optimizer, lam=lam, alpha=alpha, norm=norm, warmup=warmup, delay=delay
        )
        # In narrower weights the step would be rounded away, and is kept beside them. Where float32
        # weights are computed with in bfloat16 much of it is lost, as it was in what is published.
        wide = next(model.parameters()).dtype.itemsize >= 4
        self.optimizer.perturbed = merged_weights(model) if wide else MergedOffsets(model)
