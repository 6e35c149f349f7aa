"""The defenses of the benchmark: each a method for the alignment and one for the fine-tuning stage.

One file holds one method and reads like its formula.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.booster_held import BoosterHeld
from benchmarks.harmful_finetuning.methods.booster_vaccine import BoosterVaccine
from benchmarks.harmful_finetuning.methods.booster_warmed import BoosterWarmed
from benchmarks.harmful_finetuning.methods.booster_weighted import BoosterWeighted
from benchmarks.harmful_finetuning.methods.lisa import Lisa
from benchmarks.harmful_finetuning.methods.random_direction import RandomDirection
from benchmarks.harmful_finetuning.methods.repnoise import RepNoise
from benchmarks.harmful_finetuning.methods.second_order import SecondOrder
from benchmarks.harmful_finetuning.methods.sft import SFT
from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate
from benchmarks.harmful_finetuning.methods.tensor_wise import TensorWise
from benchmarks.harmful_finetuning.methods.vaccine import Vaccine

__all__ = [
    "METHODS",
    "SFT",
    "Batches",
    "Booster",
    "BoosterHeld",
    "BoosterVaccine",
    "BoosterWarmed",
    "BoosterWeighted",
    "Lisa",
    "Method",
    "RandomDirection",
    "RepNoise",
    "SecondOrder",
    "Stage",
    "TensorWise",
    "Vaccine",
    "backpropagate",
    "hyperparameters",
]

BOOSTER = "Huang et al., ICLR 2025, arXiv 2409.01586"
LISA = "Huang et al., NeurIPS 2024, arXiv 2405.18641"
REPNOISE = "Rosati et al., NeurIPS 2024, arXiv 2405.14577"
VACCINE = "Huang et al., NeurIPS 2024, arXiv 2402.01109"


class Method(NamedTuple):
    """A defense: what it does in each of the two stages."""

    alignment: type[Stage]
    fine_tuning: type[Stage]
    single_adapter: bool  # one LoRA adapter through both stages, else merged and a second one
    reference: str


# Booster simulates the attack on the adapter, hence the attack must be on that adapter too; for the
# other methods the paper merges the first adapter and fine-tunes a second.
METHODS: dict[str, Method] = {
    "sft": Method(SFT, SFT, False, "plain training in both stages"),
    "lisa": Method(SFT, Lisa, False, LISA),
    "repnoise": Method(RepNoise, SFT, False, REPNOISE),
    "vaccine": Method(Vaccine, SFT, False, VACCINE),
    "booster": Method(Booster, SFT, True, BOOSTER),
    "booster_vaccine": Method(BoosterVaccine, SFT, True, f"{BOOSTER}; {VACCINE}"),
    "booster_lisa": Method(Booster, Lisa, True, f"{BOOSTER}; {LISA}"),
    "booster_held": Method(BoosterHeld, SFT, True, "a variation, not from a paper"),
    "booster_warmed": Method(BoosterWarmed, SFT, True, "a variation, not from a paper"),
    "booster_weighted": Method(BoosterWeighted, SFT, True, "a variation, not from a paper"),
    "random_direction": Method(RandomDirection, SFT, True, "a control, not from a paper"),
    "tensor_wise": Method(TensorWise, SFT, True, "a comparison, not from a paper"),
    "second_order": Method(SecondOrder, SFT, True, "a comparison, not from a paper"),
}


def hyperparameters(stage_class: type[Stage]) -> dict[str, Any]:
    """The hyperparameters of a stage and their defaults, from its signature."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(stage_class).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
