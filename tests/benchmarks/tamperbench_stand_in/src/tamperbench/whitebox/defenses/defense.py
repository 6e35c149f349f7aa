"""What a defense is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tamperbench.whitebox.utils.keys import checked


@dataclass
class AlignmentDefenseConfig:
    """From which checkpoint to which."""

    input_checkpoint_path: Path
    output_checkpoint_path: Path

    def __post_init__(self):
        self.input_checkpoint_path = Path(self.input_checkpoint_path)
        self.output_checkpoint_path = Path(self.output_checkpoint_path)

    @classmethod
    def from_dict(cls, data):
        """From YAML."""
        return cls(**checked(cls, data))


Config = TypeVar("Config", bound=AlignmentDefenseConfig)


class AlignmentDefense(ABC, Generic[Config]):
    """A defense of the alignment stage."""

    def __init__(self, defense_config: Config):
        self.defense_config = defense_config

    @abstractmethod
    def run_defense(self) -> Path:
        """Writes the aligned checkpoint and returns its folder."""
