"""The formula's gradient on a language model, from the passes that its run was seen to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import Loss, booster_gradient

Batch = dict[str, Tensor]
LossOf = Callable[[Tensor, Tensor, int], Tensor]  # logits, labels, tokens to divide by -> loss


@dataclass
class Pass:
    """What a forward pass was given, and the random state that its masks were drawn from."""

    batch: Batch
    random_state: Tensor

    def same_as(self, other: Pass) -> bool:
        mine, theirs = self.batch, other.batch
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def token_mean(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
    targets = labels[:, 1:].flatten()
    log_p = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    kept = targets != -100
    return -log_p[kept].gather(1, targets[kept, None]).sum() / tokens


def tokens_in(passes: list[Pass]) -> int:
    return sum(int((p.batch["labels"][:, 1:] != -100).sum()) for p in passes)


def replayed(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    alignment: list[Pass],
    harmful: list[Pass],
    lam: float,
    alpha: float,
    loss_of: LossOf = token_mean,
) -> dict[str, Tensor | None]:
    """The gradient of each of these weights, with a loss of its own and the masks of the run."""

    def loss_on(passes: list[Pass]) -> Loss:
        tokens = tokens_in(passes)

        def loss(values: Any) -> Tensor:
            total = torch.zeros(())
            for p in passes:
                torch.set_rng_state(p.random_state)
                inputs = {k: v for k, v in p.batch.items() if k != "labels"}
                at = dict(zip(weights, values, strict=True))
                logits = functional_call(model, at, (), inputs).logits
                total = total + loss_of(logits, p.batch["labels"], tokens)
            return total

        return loss

    with torch.random.fork_rng(devices=[]):
        grads = booster_gradient(
            loss_on(alignment), loss_on(harmful), list(weights.values()), lam, alpha
        )
    return dict(zip(weights, grads, strict=True))
