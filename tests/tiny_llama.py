"""A small random Llama with an alignment and a harmful loss, and the formula's gradient on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.replay import Pass, replayed, token_mean
from torch_booster import BoosterOptimizer

VOCABULARY = 32
LAM, ALPHA = 20.0, 0.5  # so that the regulariser outweighs rounding by far
ALIGNMENT, HARMFUL = torch.randint(
    VOCABULARY, (2, 3, 7), generator=torch.Generator().manual_seed(1)
)
SEED = 7  # of the dropout masks

Gradients = Mapping[str, Tensor | None]


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,  # a block of 4-bit weights
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def closure(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def forward_and_backward() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return forward_and_backward


def boosted(params: Any, **changes: Any) -> BoosterOptimizer:
    base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    return BoosterOptimizer(base, LAM, ALPHA, **changes)


def step(model: Any, optimizer: BoosterOptimizer, forward: Any = None) -> Gradients:
    """One step in stages; returns the gradients that the base optimizer was given.

    `forward` is the model as the loop calls it, where that is another object (compiled, say).
    """
    forward = model if forward is None else forward
    optimizer.zero_grad()
    torch.manual_seed(SEED)
    optimizer.regularize(closure(forward, HARMFUL))
    torch.manual_seed(SEED)
    closure(forward, ALIGNMENT)()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in trainable(model).items()}
    optimizer.step()
    return grads


def formula(model: nn.Module, lam: float = LAM) -> Gradients:
    """The gradient of the next step, on a copy of the model and with a loss of its own."""
    twin = copy.deepcopy(model)
    for module in twin.modules():  # it would recompute with the weights of the twin itself
        module.gradient_checkpointing = False
    masks = torch.Generator().manual_seed(SEED).get_state()
    f, h = ([Pass({"input_ids": ids, "labels": ids}, masks)] for ids in (ALIGNMENT, HARMFUL))
    return replayed(twin, trainable(model), f, h, lam, ALPHA, mean)


def mean(logits: Tensor, labels: Tensor, _: int) -> Tensor:
    """Over all tokens but the first, and over that one where virtual ones go before it."""
    virtual = logits.shape[1] - labels.shape[1]
    labels = nn.functional.pad(labels, (virtual, 0), value=-100)
    return token_mean(logits, labels, int((labels[:, 1:] != -100).sum()))


def assert_close(grads: Gradients, wanted: Gradients, tolerance: float = 1e-6) -> None:
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=tolerance, atol=tolerance)


def check_step(model: Any, optimizer: BoosterOptimizer, forward: Any = None) -> Gradients:
    """One step on the formula's gradient, in which the regulariser has a say."""
    wanted, plain = formula(model), formula(model, lam=0.0)
    grads = step(model, optimizer, forward)
    assert_close(grads, wanted)
    assert distance(wanted, plain) > 1e-3
    return grads


def distance(some: Gradients, others: Gradients) -> float:
    pairs = [(g, others[n]) for n, g in some.items()]
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None)
