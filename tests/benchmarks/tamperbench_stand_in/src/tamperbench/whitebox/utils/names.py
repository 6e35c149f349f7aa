"""The names that attacks and defenses register under."""

from enum import Enum


class AttackName(str, Enum):
    """Attacks."""

    LORA_FINETUNE = "lora_finetune"


class DefenseName(str, Enum):
    """Defenses."""

    BOOSTER = "booster"
