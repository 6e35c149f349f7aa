"""The defenses: each a name for a method of the alignment and one of the attack, with settings.

One file holds one method and reads like its formula. A new setting of a method that exists is a
line in `METHODS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.harmful_finetuning.methods.booster import Booster
from benchmarks.harmful_finetuning.methods.booster_held import BoosterHeld
from benchmarks.harmful_finetuning.methods.booster_merged import BoosterMerged
from benchmarks.harmful_finetuning.methods.booster_mixture import BoosterMixture
from benchmarks.harmful_finetuning.methods.booster_vaccine import BoosterVaccine
from benchmarks.harmful_finetuning.methods.lisa import Lisa
from benchmarks.harmful_finetuning.methods.random_direction import RandomDirection
from benchmarks.harmful_finetuning.methods.repnoise import RepNoise
from benchmarks.harmful_finetuning.methods.second_order import SecondOrder
from benchmarks.harmful_finetuning.methods.sft import SFT
from benchmarks.harmful_finetuning.methods.stage import Stage
from benchmarks.harmful_finetuning.methods.vaccine import Vaccine
from benchmarks.harmful_finetuning.settings import Settings

BOOSTER = "Huang et al., ICLR 2025, arXiv 2409.01586"
LISA = "Huang et al., NeurIPS 2024, arXiv 2405.18641"
REPNOISE = "Rosati et al., NeurIPS 2024, arXiv 2405.14577"
VACCINE = "Huang et al., NeurIPS 2024, arXiv 2402.01109"
OWN = "not from a paper"


class Method(NamedTuple):
    """A defense: what it does in each of the two stages."""

    label: str
    reference: str
    alignment: type[Stage] = SFT
    attack: type[Stage] = SFT
    values: Mapping[
        str, float | str
    ] = {}  # hyperparameters, where they are not the stage's defaults
    like: tuple[str, ...] = ()  # methods whose hyperparameters it takes where it is given none
    one_adapter: bool = False  # one LoRA through both stages, else merged and a second one


def defaults(stage: type[Stage]) -> dict[str, Any]:
    """The hyperparameters of a stage and their defaults, from its signature."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(stage).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _booster(label: str, kind: type[Stage], reference: str = OWN, **more: Any) -> Method:
    # Booster simulates the attack on the adapter, hence the attack must be on that adapter too;
    # for the other methods the paper merges the first adapter and fine-tunes a second.
    return Method(label, reference, kind, one_adapter=True, **more)


METHODS: dict[str, Method] = {
    "sft": Method("SFT", "plain training in both stages"),
    "lisa": Method("Lisa", LISA, attack=Lisa),
    "repnoise": Method("RepNoise", REPNOISE, RepNoise),
    "vaccine": Method("Vaccine", VACCINE, Vaccine),
    "booster": _booster("Booster", Booster, BOOSTER),
    "booster_warmed": _booster("Booster, λ warmed up", Booster, values={"warmup": 500}),
    "booster_recommended": _booster(
        "Booster, recommended",
        Booster,
        values={
            "norm": "tensor",
            "lam": 20.0,
            "alpha": 0.2,
            "warmup": 500,
            "delay": 250,
            "trust_region": True,
        },
    ),
    "booster_merged": Method(
        "Booster, in the merged weights",
        OWN,
        BoosterMerged,
        values={"warmup": 500, "delay": 250},
    ),
    "booster_mixture": _booster(
        "Booster, lengths mixed",
        BoosterMixture,
        values={"norm": "tensor", "lam": 10.0, "alpha": 0.2, "warmup": 500, "delay": 250},
    ),
    "booster_vaccine": _booster("Booster + Vaccine", BoosterVaccine, f"{BOOSTER}; {VACCINE}"),
    "booster_lisa": _booster(
        "Booster + Lisa", Booster, f"{BOOSTER}; {LISA}", attack=Lisa, like=("booster", "lisa")
    ),
    "booster_held": _booster("Booster, held", BoosterHeld, like=("booster",)),
    "booster_weighted": _booster(
        "Booster, weighted", Booster, values={"every": 4}, like=("booster",)
    ),
    "random_direction": _booster("random direction", RandomDirection, like=("booster",)),
    "tensor_wise": _booster(
        "Booster, norms by tensor", Booster, values={"norm": "tensor"}, like=("booster",)
    ),
    "second_order": _booster("Booster, second order", SecondOrder, like=("booster",)),
}

RECOMMENDED = {"full": "booster_recommended", "lora": "booster_merged"}
"""The method to take, by what trains."""


def hyperparameters(name: str, settings: Settings) -> dict[str, Any]:
    """All hyperparameters of a method's two stages, with what the settings give it.

    Raises:
        ValueError: There is no such method or hyperparameter.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")
    method, own = METHODS[name], settings.given_to(name)
    values = defaults(method.alignment) | defaults(method.attack)
    if unknown := own.keys() - values.keys():
        raise ValueError(
            f"{name} has no hyperparameter {', '.join(sorted(unknown))}; it has "
            f"{', '.join(values) or 'none'}"
        )
    shared = {k: v for other in method.like for k, v in settings.given_to(other).items()}
    chosen = {k: v for k, v in shared.items() if k in values} | dict(method.values) | own
    if "steps" in defaults(method.attack):
        chosen["steps"] = settings.attack.steps
    return {key: type(default)(chosen.get(key, default)) for key, default in values.items()}
