"""Booster (Huang et al., ICLR 2025) around any PyTorch optimizer."""

from importlib.metadata import version

from torch_booster.diagnostics import Diagnostics
from torch_booster.optimizer import BoosterOptimizer

__all__ = ["BoosterOptimizer", "Diagnostics", "__version__"]

__version__ = version("torch_booster")
