"""Booster and Vaccine at once: Booster's step with the alignment gradient made by Vaccine.

    g = ∇_w f(w; out_l + e_l) + λ·(∇h(w) − ∇h(w′))

with e_l of `vaccine` and w′ of `booster`. Four forward and backward passes a step.

Source: the code of Booster, git-disl/Booster, `--perturb_aware True`; its script takes λ = 5,
α = 0.1 and ρ = 5, which are the defaults here (Vaccine alone: ρ = 2).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.stage import Batches
from benchmarks.harmful_finetuning.methods.vaccine import Vaccine


class BoosterVaccine(Booster):
    """Trains on `batches` as Vaccine does, with Booster's regulariser of a harmful batch.

    Args:
        model: See `Stage`.
        optimizer: The base optimizer; `self.optimizer` wraps it.
        lam: λ ≥ 0, regulariser intensity; 0 is Vaccine.
        alpha: α ≥ 0, length of the simulated harmful step.
        rho: ρ ≥ 0, the norm of Vaccine's perturbation; 0 is Booster.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lam: float = 5.0,
        alpha: float = 0.1,
        rho: float = 5.0,
    ) -> None:
        super().__init__(model, optimizer, lam=lam, alpha=alpha)
        self.vaccine = Vaccine(model, self.optimizer, rho=rho)

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """The regulariser first, then Vaccine's gradient. Returns the perturbed alignment loss."""
        self.regularize(auxiliary)
        return self.vaccine.backward(batches, auxiliary)
