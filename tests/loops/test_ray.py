"""Booster in a plain loop that Ray Train runs on two workers, against the formula."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import booster_gradient

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of Ray's own
]

LAM, ALPHA, STEPS, WORKERS = 5.0, 0.1, 4, 2


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(step: int, harmful: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2 * step + harmful)
    pair = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    return pair[0].double(), pair[1].double()


def train(config: dict[str, Any]) -> None:
    """As docs/places/ray.md has it."""
    import ray.train
    import ray.train.torch

    from torch_booster import BoosterOptimizer

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    model = ray.train.torch.prepare_model(model_of())
    optimizer = BoosterOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), LAM, ALPHA)

    def backward(step: int, harmful: bool) -> Tensor:
        x, y = (part.chunk(size)[rank] for part in batch(step, harmful))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.regularize(lambda step=step: backward(step, True))
        backward(step, False)
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    if rank == 0:  # not by ray.train.report: its metrics come back with a checkpoint alone
        torch.save({"weights": weights, "ranks": size}, config["into"])


def test_two_workers_take_the_formulas_steps(tmp_path: Path) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # A cluster of this machine alone, which leaves no token behind.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    paths = os.environ.get("PYTHONPATH", "")
    ray.init(
        num_cpus=WORKERS + 1,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    try:
        trainer = TorchTrainer(
            train,
            train_loop_config={"into": str(tmp_path / "found.pt")},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(storage_path=str(tmp_path)),
        )
        trainer.fit()
    finally:
        ray.shutdown()

    model = model_of()
    names = [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):

        def loss(values: Any, harmful: bool, step: int = step) -> Tensor:
            x, y = batch(step, harmful)
            at = dict(zip(names, values, strict=True))
            return nn.functional.mse_loss(functional_call(model, at, (x,)), y)

        params = list(model.parameters())
        found = booster_gradient(
            lambda v: loss(v, False), lambda v: loss(v, True), params, LAM, ALPHA
        )
        for p, g in zip(params, found, strict=True):
            p.grad = g
        optimizer.step()
    end = torch.load(tmp_path / "found.pt")
    assert end["ranks"] == WORKERS
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(end["weights"], wanted, rtol=0, atol=1e-12)
