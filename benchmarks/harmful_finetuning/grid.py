"""A grid of runs: what is finished is kept, what is left is shared among processes.

A run has three stages, each kept under a name that hashes its code, data, settings and seed: the
base model, the aligned model, and the fine-tuning with its scores. Runs that share a stage share
its result, so that all methods start from one base, SFT and Lisa align once and all fractions p
attack one aligned model.
"""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from benchmarks.harmful_finetuning import ROOT, data, methods, metrics, models, training
from benchmarks.harmful_finetuning.settings import Settings
from lora_alignment import (
    Report,
    digest,
    in_worker,
    load_model,
    load_tokenizer,
    read_json,
    shown_on,
    start_worker,
    written_whole,
)

__all__ = ["Cell", "base_folder", "described", "pretrain", "run", "samples_of"]

ALIGNMENT = (
    *("dtype", "template", "end_token", "max_length", "trained", "align_steps", "align_lr"),
    *("batch_size", "weight_decay", "max_grad_norm", "align_optimizer"),
)
LORA = ("lora_r", "lora_alpha", "lora_targets")
"""Settings that, with the samples, the base and the method, decide an aligned model."""


class Cell(NamedTuple):
    """One run: a method, a seed and the settings of both stages."""

    method: str
    seed: int
    settings: Settings
    vary: dict[str, Any]  # what the experiment sweeps beside p, samples, task and architecture


def samples_of(settings: Settings) -> data.Samples:
    """The samples of a run, which runs of the same settings share."""
    return _loaded(json.dumps(asdict(settings)))


@functools.cache
def _loaded(settings: str) -> data.Samples:
    return data.load(Settings(**json.loads(settings)))


def _hash(*parts: Any) -> str:
    library = sorted((ROOT / "torch_booster").glob("*.py"))
    return digest([path.read_text() for path in library], *parts)


def _sources(stage: type[methods.Stage], *parts: Any) -> list[str]:
    """The code that decides a result, with all classes of the benchmark that a stage is made of."""
    own = [part for part in stage.__mro__ if part.__module__.startswith(methods.__name__)]
    return [inspect.getsource(part) for part in (*own, methods.backpropagate, *parts)]


def aligned_folder(cell: Cell, cache: Path) -> Path:
    """Where the cell's aligned model is kept."""
    names = ALIGNMENT + (LORA if cell.settings.trained == "lora" else ())
    settings = {name: getattr(cell.settings, name) for name in names}
    kind = methods.METHODS[cell.method].alignment
    sources = _sources(kind, training.align, training._train, load_model, load_tokenizer)
    samples = samples_of(cell.settings)
    given = training.given_to(kind, cell.settings)
    base = models.base_key(cell.settings, cell.seed)
    name = _hash(sources, base, settings, samples.alignment, samples.harmful, given, cell.seed)
    return cache / f"aligned-{kind.__module__.rpartition('.')[2]}-{name}"


def _result_file(cell: Cell, cache: Path) -> Path:
    kind = methods.METHODS[cell.method].fine_tuning
    sources = _sources(kind, training.fine_tune, training._train, metrics, data)
    given = training.given_to(kind, cell.settings)
    settings = asdict(cell.settings) | {"hyperparameters": given, "device": ""}
    aligned = aligned_folder(cell, cache).name
    single = methods.METHODS[cell.method].single_adapter
    return cache / f"run-{_hash(sources, aligned, settings, single, cell.seed)}.json"


def base_folder(cell: Cell, cache: Path) -> Path:
    """Where the cell's base model is, or will be."""
    settings = cell.settings
    if settings.model:
        return Path(settings.model)
    name = digest(models.base_key(settings, cell.seed))
    return cache / f"base-{settings.architecture}-{name}"


def pretrain(cell: Cell, cache: Path, report: Report) -> None:
    """Pretrains the cell's base model unless it is there."""
    folder = base_folder(cell, cache)
    if not cell.settings.model and not folder.exists():
        with written_whole(folder) as unfinished:
            models.pretrain(cell.settings, cell.seed, unfinished, report)


def align(cell: Cell, cache: Path, report: Report) -> None:
    """Aligns the cell's model unless it is there."""
    folder = aligned_folder(cell, cache)
    if not folder.exists():
        samples = samples_of(cell.settings)
        base = base_folder(cell, cache)
        with written_whole(folder) as unfinished:
            training.align(cell.settings, samples, base, cell.method, cell.seed, unfinished, report)


def fine_tune(cell: Cell, cache: Path, report: Report) -> dict[str, Any]:
    """The cell's result, fine-tuned unless it is there."""
    file = _result_file(cell, cache)
    if not file.exists():
        samples = samples_of(cell.settings)
        base, aligned = base_folder(cell, cache), aligned_folder(cell, cache)
        result = training.fine_tune(
            cell.settings, samples, base, aligned, cell.method, cell.seed, report
        )
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        unfinished.write_text(json.dumps(described(cell) | result))
        unfinished.replace(file)
    return read_json(file) | {"method": cell.method, "vary": cell.vary}


def described(cell: Cell) -> dict[str, Any]:
    """What a result says of how it was made."""
    method, settings = methods.METHODS[cell.method], cell.settings
    stages = (method.alignment, method.fine_tuning)
    return {
        "method": cell.method,
        "seed": cell.seed,
        "p": settings.p,
        "samples": settings.samples,
        "task": settings.task,
        "architecture": settings.model or settings.architecture,
        "trained": settings.trained,
        "hyperparameters": {
            key: value
            for stage in stages
            for key, value in (
                methods.hyperparameters(stage) | training.given_to(stage, settings)
            ).items()
        },
        "settings": asdict(settings),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"torch_booster": version("torch_booster"), "python": platform.python_version()},
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run(
    cells: Iterable[Cell], cache: Path, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Runs every cell that is not finished and returns all results in the order of the cells.

    Args:
        cells: What to run.
        cache: Folder of finished stages.
        workers: Processes that share the runs; with 1 everything runs in this process.
        progress: Shows the whole grid with the time left, and each stage that is running.

    Raises:
        ValueError: A cell's samples or hyperparameters do not fit; nothing has been run.
    """
    cells = list(cells)
    if not cells:
        return []
    for cell in cells:
        training.given_to(methods.METHODS[cell.method].fine_tuning, cell.settings)
    jobs = _jobs(cells, cache)
    show = shown_on(progress)
    total = progress.add_task("runs", total=_count(jobs))
    if workers == 1:
        _in_turn(jobs, cache, show, lambda: progress.advance(total))
    else:
        _share(jobs, cache, workers, show, lambda: progress.advance(total))
    return [fine_tune(cell, cache, show) for cell in cells]


class _Job(NamedTuple):
    """A stage of a cell, and the jobs that start from its result."""

    stage: Callable[[Cell, Path, Report], Any]
    cell: Cell
    then: dict[Path, _Job]


def _jobs(cells: Iterable[Cell], cache: Path) -> dict[Path, _Job]:
    """Every stage once, under the place of its result."""
    stages = ((pretrain, base_folder), (align, aligned_folder), (fine_tune, _result_file))
    bases: dict[Path, _Job] = {}
    for cell in cells:
        jobs = bases
        for stage, place in stages:
            jobs = jobs.setdefault(place(cell, cache), _Job(stage, cell, {})).then
    return bases


def _count(jobs: dict[Path, _Job]) -> int:
    return sum(1 + _count(job.then) for job in jobs.values())


def _in_turn(
    jobs: dict[Path, _Job], cache: Path, show: Report, advance: Callable[[], None]
) -> None:
    """Runs all jobs in this process."""
    for job in jobs.values():
        job.stage(job.cell, cache, show)
        advance()
        _in_turn(job.then, cache, show, advance)


def _share(
    jobs: dict[Path, _Job],
    cache: Path,
    workers: int,
    show: Report,
    advance: Callable[[], None],
) -> None:
    """Runs all jobs in processes, each as soon as the one that it starts from is done."""
    context = multiprocessing.get_context("spawn")
    events, stop = context.Queue(), context.Event()
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, start_worker, (events, stop, threads)) as pool:
        waiting: dict[Future[Any], dict[Path, _Job]] = {}

        def submit(jobs: dict[Path, _Job]) -> None:
            for job in jobs.values():
                waiting[pool.submit(in_worker, job.stage, job.cell, cache)] = job.then

        try:
            submit(jobs)
            while waiting:
                finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                while not events.empty():
                    show(*events.get())
                for future in finished:
                    then = waiting.pop(future)
                    future.result()
                    advance()
                    submit(then)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
