"""Small models and losses that the tests share, all in float64 unless asked otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import Loss
from torch_booster import BoosterOptimizer


class MLP(nn.Module):
    """Two layers; `frozen` and `unused` never receive a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.outer = nn.Linear(7, 3)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)) * self.frozen)


class Tied(nn.Module):
    """Embedding and output layer share one matrix, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.argmax(-1)
        return self.head(torch.tanh(self.body(self.embedding(tokens))))[..., :3]


class Mixture(nn.Module):
    """Two experts, each used by one of the losses alone, behind a common layer."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(5, 5)
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        hidden = torch.tanh(self.common(x))
        if expert is None:
            return self.experts[0](hidden) + self.experts[1](hidden)
        return self.experts[expert](hidden)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "tied": Tied, "mixture": Mixture}


@dataclass
class Problem:
    """A model with an alignment loss f and a harmful loss h, as closures and as functions."""

    model: nn.Module
    f: Callable[[], Tensor]
    h: Callable[[], Tensor]
    params: list[Tensor]
    f_of: Loss
    h_of: Loss

    def f_closure(self) -> Tensor:
        loss = self.f()
        loss.backward()
        return loss

    def h_closure(self) -> Tensor:
        loss = self.h()
        loss.backward()
        return loss

    def take_step(self, opt: BoosterOptimizer, usage: str) -> None:
        """One step, "one_call" or else in stages."""
        opt.zero_grad()
        if usage == "one_call":
            opt.step(self.f_closure, self.h_closure)
        else:
            opt.regularize(self.h_closure)
            self.f_closure()
            opt.step()


def make_problem(name: str = "mlp", seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    x_f, x_h = torch.randn(6, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    y_f, y_h = torch.randn(6, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    expert = {"f": {"expert": 0}, "h": {"expert": 1}} if name == "mixture" else {"f": {}, "h": {}}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    others = {n: p for n, p in model.named_parameters() if not p.requires_grad}

    def f() -> Tensor:
        return nn.functional.mse_loss(model(x_f, **expert["f"]), y_f)

    def h() -> Tensor:
        return nn.functional.mse_loss(model(x_h, **expert["h"]), y_h)

    def functional(x: Tensor, y: Tensor, kwargs: dict[str, int]) -> Loss:
        def loss(values: Sequence[Tensor]) -> Tensor:
            at = {**others, **dict(zip(named, values, strict=True))}
            return nn.functional.mse_loss(functional_call(model, at, (x,), kwargs), y)

        return loss

    return Problem(
        model,
        f,
        h,
        list(named.values()),
        functional(x_f, y_f, expert["f"]),
        functional(x_h, y_h, expert["h"]),
    )


def quadratic(
    size: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric H, b and w of the loss ½wᵀHw − bᵀw, whose gradient is Hw − b."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    return (root @ root.T / size).to(dtype), b.to(dtype), w.to(dtype)
