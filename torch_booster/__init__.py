"""Booster (Huang et al., ICLR 2025) around any PyTorch optimizer."""

from importlib.metadata import version

from torch_booster.optimizer import BoosterOptimizer, Diagnostics

__all__ = ["BoosterOptimizer", "Diagnostics", "__version__"]

__version__ = version("torch_booster")
