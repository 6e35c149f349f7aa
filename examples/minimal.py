"""Booster in a plain loop: a classifier learns one labelling and resists another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_booster import BoosterOptimizer

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 2))
inputs = torch.randn(512, 16)
refusal = (inputs[:, 0] > 0).long()  # what alignment teaches
harmful = (inputs[:, 1] > 0).long()  # what an attacker would teach


def closure_for(labels: Tensor, batch: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of one loss on one batch."""

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        return loss

    return closure


base_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer = BoosterOptimizer(base_optimizer, lam=5.0, alpha=0.1)

for step in range(301):
    optimizer.zero_grad()
    batch = torch.randint(512, (64,))
    loss = optimizer.step(closure_for(refusal, batch), closure_for(harmful, batch))
    if step % 100 == 0 and optimizer.diagnostics:
        drop = optimizer.diagnostics.harmful_loss_drop  # what a harmful step gains
        print(f"step {step}: alignment loss {loss:.3f}, harmful loss drop {drop:.4f}")
