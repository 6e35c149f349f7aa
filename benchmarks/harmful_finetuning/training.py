"""The loop of both stages, around a method's way to make the gradient of a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.harmful_finetuning.methods.stage import Stage

Batches = Iterator[dict[str, Tensor]]


class Trained(NamedTuple):
    """What a stage went through."""

    trace: list[dict[str, float]]  # about 20 rows of loss and diagnostics
    seconds: float  # a step, on average
    passes: float  # forward passes a step
    warnings: list[str]  # what the diagnostics warned of


def train(
    stage: Stage,
    batches: Batches,
    auxiliary: Batches,
    steps: int,
    max_grad_norm: float,
    after: Callable[[int], None],
) -> Trained:
    """Steps a stage: zero the gradients, make that of the method, clip, step.

    Args:
        stage: The method's.
        batches: What is learned.
        auxiliary: What the method may use beside it.
        steps: How many.
        max_grad_norm: Clips the combined gradient; 0 does not.
        after: Called with the number of each step that was made.
    """
    parameters = [p for p in stage.model.parameters() if p.requires_grad]
    stage.model.train()
    trace: list[dict[str, float]] = []
    warned: list[str] = []
    seconds, passes = 0.0, 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    embedding: Any = stage.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    for step in range(1, steps + 1):
        hook = embedding.register_forward_hook(count)
        start = time.perf_counter()
        try:
            stage.optimizer.zero_grad()
            loss = stage.backward(batches, auxiliary)
        finally:
            hook.remove()
        if max_grad_norm:
            clip_grad_norm_(parameters, max_grad_norm)
        stage.optimizer.step()
        seconds += time.perf_counter() - start
        if step % max(1, steps // 20) == 0 or step == steps:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                seen = stage.diagnostics()
            for warning in told:
                warned.append(str(warning.message))
                warnings.warn(warning.message, stacklevel=2)
            trace.append({"step": step, "alignment_loss": float(loss), **seen})
        after(step)
    return Trained(trace, seconds / steps, passes / steps, warned)


def make_optimizer(name: str, model: Any, lr: float, weight_decay: float) -> Optimizer:
    """An optimizer of all that the model trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=0.9)
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
