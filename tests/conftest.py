"""Hypothesis profile and the optimizers that the contract is tested over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("torch_booster", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("torch_booster")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
