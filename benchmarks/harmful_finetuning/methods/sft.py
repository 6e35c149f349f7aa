"""Supervised fine-tuning: g = ∇f(w), in the alignment stage and in the fine-tuning stage."""

from __future__ import annotations

from torch import Tensor

from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate


class SFT(Stage):
    """Plain training on `batches`."""

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """Makes g = ∇f(w); `auxiliary` is not used. Returns f(w)."""
        return backpropagate(self.model, next(batches))
