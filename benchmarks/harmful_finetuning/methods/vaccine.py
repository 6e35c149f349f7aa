"""Vaccine: alignment under the worst perturbation of the hidden embeddings.

With g_l the gradient of the alignment loss f with respect to the output of layer l's
self-attention, and ‖g‖ one norm over all layers (and the whole batch),

    e_l = ρ·g_l / (‖g‖ + 1e-7),    g = ∇_w f(w; out_l + e_l),

where e is a constant in the second pass. Two forward and backward passes a step.

Source: Huang, Hu, Liu, "Vaccine: Perturbation-aware Alignment for Large Language Models against
Harmful Fine-tuning Attack", NeurIPS 2024, arXiv 2402.01109, and its code, git-disl/Vaccine. ρ = 2
is the value of its README and of the checkpoints that Booster's fine-tuning scripts load;
Booster's alignment script for Vaccine says 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.layers import forward_hooks, submodules
from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate

EPS = 1e-7


class Vaccine(Stage):
    """Trains on `batches` with perturbed attention outputs.

    Args:
        model: See `Stage`.
        optimizer: See `Stage`.
        rho: ρ ≥ 0, the norm of the perturbation over all layers; 0 is SFT.

    Raises:
        ValueError: The model has no self-attention to perturb.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, rho: float = 2.0) -> None:
        super().__init__(model, optimizer)
        self.rho = rho
        self.attentions = submodules(model, "self_attn")

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """Makes g = ∇_w f(w; out_l + e_l); `auxiliary` is not used. Returns that f."""
        batch = next(batches)
        e = self.perturbation(batch)
        with forward_hooks(self.attentions, lambda layer, _, output: plus(output, e[layer])):
            return backpropagate(self.model, batch)

    def perturbation(self, batch: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
        """e_l of each self-attention, of the shape of its output; `.grad` is not touched."""
        # ∂f/∂e at e = 0 is g, also where a layer and all before it are frozen and its own output
        # therefore carries no graph.
        zeros: dict[nn.Module, Tensor] = {}

        def add_zero(layer: nn.Module, _: Any, output: Any) -> Any:
            zeros[layer] = torch.zeros_like(attended(output), requires_grad=True)
            return plus(output, zeros[layer])

        with forward_hooks(self.attentions, add_zero):
            loss = self.model(**batch).loss
        g = torch.autograd.grad(loss, list(zeros.values()))
        scale = self.rho / (get_total_norm(g) + EPS)
        return {layer: scale * g_l for layer, g_l in zip(zeros, g, strict=True)}


def attended(output: Any) -> Tensor:
    """The attention output, which transformers returns together with the attention weights."""
    return output[0] if isinstance(output, tuple) else output


def plus(output: Any, e: Tensor) -> Any:
    """The same output with e added to its attention output."""
    return (output[0] + e, *output[1:]) if isinstance(output, tuple) else output + e
