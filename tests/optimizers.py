"""Every optimizer of torch.optim, and what stands against wrapping a few of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

REFUSED = {
    "LBFGS": "its step needs a closure that it calls several times",
    "SparseAdam": "it takes sparse gradients only",
}

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Adadelta": {"lr": 0.5},
}

# Only matrices, as hidden layers have.
MATRICES_ONLY = {"Muon"}

NAMES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
)
WRAPPABLE = [name for name in NAMES if name not in REFUSED]


def make(name: str, params: Iterable[Any], **options: Any) -> Optimizer:
    """An instance of a torch optimizer over tensors or param groups."""
    return getattr(torch.optim, name)(params, **{"lr": 0.01, **OPTIONS.get(name, {}), **options})


def accepted(name: str, params: Iterable[Tensor]) -> list[Tensor]:
    """Those of the parameters that the optimizer can take."""
    return [p for p in params if p.ndim == 2 or name not in MATRICES_ONLY]
