"""A small model and its data, and the forward and backward pass of one loss on one batch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
inputs = torch.randn(64, 16)
refusal = (inputs[:, 0] > 0).long()  # what alignment teaches
harmful = (inputs[:, 1] > 0).long()  # what an attacker would teach
alignment_loader = DataLoader(TensorDataset(inputs, refusal), batch_size=8)
harmful_loader = DataLoader(TensorDataset(inputs, harmful), batch_size=8)


def loss_of(model, batch):
    """Forward pass."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def backward(model, batch):
    """Forward and backward pass."""
    loss = loss_of(model, batch)
    loss.backward()
    return loss
