"""What each method's step costs: time, passes and memory, side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harmful_finetuning import runs
from benchmarks.harmful_finetuning.align import prepared
from benchmarks.harmful_finetuning.methods import METHODS
from benchmarks.harmful_finetuning.models import Tell, load_tokenizer
from benchmarks.harmful_finetuning.runs import Run
from benchmarks.harmful_finetuning.tokens import batches
from benchmarks.live_memory import peak_bytes

ROUNDS = 20


def measure(wanted: list[Run], cache: Path, tell: Tell) -> list[dict[str, Any]]:
    """Alignment steps of every method, interleaved: one step of each in every round.

    Returns:
        Rows of the table `costs`: for each method the seconds of its median step with the
        quartiles, the ratio to the first's, forward passes a step, and the peak of the memory that
        a step holds beyond model, gradients and optimizer.
    """
    runs.make_base(wanted[0], cache, tell)
    steps = {run.method: _stepper(run, cache) for run in wanted}
    for step in steps.values():
        step()  # the optimizer's state is allocated in the first
    device = wanted[0].settings.device
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(1, ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
        tell("system", round_, ROUNDS)
    first = seconds[wanted[0].method]
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        low, median, high = statistics.quantiles(seconds[name], n=4)
        ratios = [a / b for a, b in zip(seconds[name], first, strict=True)]
        passes = step()
        row = {
            "trained": wanted[0].settings.trained,
            "method": name,
            "passes_per_step": passes,
            "align_seconds_per_step": median,
            "quartile_low": low,
            "quartile_high": high,
            f"times_{wanted[0].method}": statistics.median(ratios),
            "peak_memory_bytes": peak_bytes(step, device),
        }
        rows.append(row | {"commit": runs.described(wanted[0])["commit"]})
    return rows


def _stepper(run: Run, cache: Path) -> Callable[[], int]:
    """Makes one alignment step on a model of its own, and says how many forward passes it took."""
    torch.manual_seed(0)
    settings, samples = run.settings, runs.samples_of(run.settings)
    base, kind = runs.base_folder(run, cache), METHODS[run.method].alignment
    tokenizer = load_tokenizer(base, settings)
    stage = prepared(settings, base, kind, run.of(kind))
    learned = batches(samples.alignment, tokenizer, settings, 0)
    auxiliary = batches(samples.harmful, tokenizer, settings, 1)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    stage.model.train()
    embedding: Any = stage.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    embedding.register_forward_hook(count)

    def step() -> int:
        before = passes
        stage.optimizer.zero_grad()
        stage.backward(learned, auxiliary)
        stage.optimizer.step()
        return passes - before

    return step
