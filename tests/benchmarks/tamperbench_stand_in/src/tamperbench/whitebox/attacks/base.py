"""What an attack is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

from tamperbench.whitebox.utils.keys import checked


@dataclass
class TamperAttackConfig:
    """From which checkpoint, into which folder, and how the outcome is evaluated."""

    input_checkpoint_path: str
    out_dir: str
    evals: list
    model_config: Any
    random_seed: int

    @classmethod
    def from_dict(cls, data):
        """From YAML, whose model_config becomes an object."""
        own = dict(data["model_config"])
        empty = {"user_prefix": "", "assistant_prefix": "", "end_turn": ""}
        model = SimpleNamespace(**empty | own, template_name=own.get("template"))
        return cls(**checked(cls, data) | {"model_config": model})


Config = TypeVar("Config", bound=TamperAttackConfig)


class TamperAttack(ABC, Generic[Config]):
    """An attack on the weights."""

    name: Any

    def __init__(self, attack_config: Config):
        self.attack_config = attack_config
        self.output_checkpoint_path = str(Path(attack_config.out_dir, "checkpoint"))

    def __init_subclass__(cls):
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            raise TypeError(f"{cls.__name__} has no name")

    def benchmark(self):
        """Attacks unless that was done, and says where the outcome is."""
        if not Path(self.output_checkpoint_path).exists():
            self.run_attack()
        return self.output_checkpoint_path

    @abstractmethod
    def run_attack(self) -> None:
        """Writes the attacked checkpoint."""
