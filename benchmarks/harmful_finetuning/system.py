"""What each method's step costs: time, passes and memory, side by side in one process."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harmful_finetuning import data, grid, methods, models, training
from benchmarks.harmful_finetuning.grid import Cell
from benchmarks.harmful_finetuning.settings import Settings
from benchmarks.live_memory import peak_bytes
from lora_alignment import Report, load_model, load_tokenizer

__all__ = ["measure"]

ROUNDS = 20


def measure(cells: list[Cell], cache: Path, report: Report) -> list[dict[str, Any]]:
    """Alignment steps of every method, interleaved: one step of each in every round.

    Returns:
        For each cell, the seconds of its method's median step with the quartiles, the ratio to the
        first's, forward passes a step, and the peak of the memory that a step holds beyond model,
        gradients and optimizer.
    """
    settings = cells[0].settings
    samples = data.load(settings)
    grid.pretrain(cells[0], cache, report)
    base = grid.base_folder(cells[0], cache)
    tokenizer = load_tokenizer(base, settings)
    names = [cell.method for cell in cells]
    steps = {name: _Steps(settings, samples, base, tokenizer, name) for name in names}
    for method in steps.values():
        method.step()  # the optimizer's state is allocated in the first
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(1, ROUNDS + 1):
        for name, method in steps.items():
            seconds[name].append(method.timed())
        report("system", round_, ROUNDS)
    results: list[dict[str, Any]] = []
    for cell in cells:
        name, method = cell.method, steps[cell.method]
        low, median, high = statistics.quantiles(seconds[name], n=4)
        ratios = [a / b for a, b in zip(seconds[name], seconds[names[0]], strict=True)]
        results.append(
            grid.described(cell)
            | {
                "vary": {},
                "align_seconds_per_step": median,
                "align_seconds_quartiles": [low, high],
                f"times_{names[0]}": statistics.median(ratios),
                "passes_per_step": method.passes(),
                "peak_memory_bytes": peak_bytes(method.step, settings.device),
            }
        )
    return results


class _Steps:
    """Alignment steps of one method on a model of its own."""

    def __init__(
        self, settings: Settings, samples: data.Samples, base: Path, tokenizer: Any, name: str
    ) -> None:
        torch.manual_seed(0)
        self._device = settings.device
        model = load_model(base, settings)
        if settings.trained == "lora":
            model = models.adapted(model, settings)
        model.train()
        kind = methods.METHODS[name].alignment
        optimizer = training.align_optimizer(model, settings)
        self._stage = kind(model, optimizer, **training.given_to(kind, settings))
        self._batches = training.stream(samples.alignment, tokenizer, settings, 0)
        self._auxiliary = training.stream(samples.harmful, tokenizer, settings, 1)

    def step(self) -> None:
        self._stage.optimizer.zero_grad()
        self._stage.backward(self._batches, self._auxiliary)
        self._stage.optimizer.step()

    def timed(self) -> float:
        start = time.perf_counter()
        self.step()
        if self._device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def passes(self) -> int:
        """Forward passes through the model in one step."""
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        model: nn.Module = self._stage.model
        embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        hook = embedding.register_forward_hook(counted)
        try:
            self.step()
        finally:
            hook.remove()
        return count
