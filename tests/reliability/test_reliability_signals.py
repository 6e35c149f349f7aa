"""Real signals: SIGINT and SIGTERM while a worker trains, SIGKILL while one saves.

Python runs handlers of SIGINT and SIGTERM between its instructions, so that the library can put
the weights back. SIGKILL leaves nobody to do so, and what survives is what lies on the disk. The
examples write a checkpoint beside its place and rename it when it is whole; the guarantee that a
name never points to a torn checkpoint is the rename's (POSIX: atomic) and neither torch's nor
safetensors'. `test_only_the_rename_keeps_a_checkpoint_whole` shows the difference. It is one
against the death of the process: nothing is flushed to the disk, so a power cut may still lose
the last checkpoints.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Counts
from tests.trainees import (
    KINDS,
    Snapshot,
    Trainee,
    in_base_step,
    next_step_is_right,
    verdict,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the signals are POSIX's")

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 900.0
"""Seconds after which a worker that answers no more is killed, so that a test ends at all."""


class Course:
    """A training over some steps, with the state after each of them told in advance."""

    def __init__(self, kind: str, steps: int) -> None:
        self.trainee, self.twin = Trainee(kind), Trainee(kind)
        self.states: list[Snapshot] = []
        for _ in range(steps + 1):
            self.twin.step()
            self.states.append(self.twin.snapshot())
        self.done = 0

    def restart(self) -> None:
        """Back to the first state; a signal waits until that is done."""
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            self.trainee.load(self.states[0])
            self.done = 0
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# SIGINT and SIGTERM


class Arrival:
    """Handles the signals, SIGINT as Python does by default, and notes where they arrived."""

    def __init__(self) -> None:
        self.seen = self.in_base = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.seen, self.in_base = True, in_base_step(frame)
        if number == signal.SIGTERM:
            raise SystemExit
        signal.default_int_handler(number, frame)


def train_until_signalled(course: Course, arrival: Arrival) -> str:
    """Trains without end and returns the traceback of the interruption.

    Where Python swallows the exception, as it does in destructors, training merely goes on.
    """
    arrival.seen = False
    try:
        print("training", flush=True)
        while not arrival.seen:
            course.restart()
            for done in range(len(course.states) - 1):
                course.done = done
                course.trainee.step()
                if arrival.seen:
                    break
    except (KeyboardInterrupt, SystemExit):
        return traceback.format_exc()
    return "swallowed"


def answer_signals() -> None:
    """The worker: trains the kind that each line of stdin names, prints what a signal left."""
    torch.set_num_threads(1)
    arrival = Arrival()
    courses = {kind: Course(kind, 10) for kind in KINDS}
    for line in sys.stdin:
        course = courses[line.strip()]
        where = train_until_signalled(course, arrival)
        before, after = course.states[course.done : course.done + 2]
        left = verdict(course.trainee, before, after, arrival.in_base)
        torch.set_grad_enabled(True)  # the exit of no_grad may have been what was interrupted
        right = next_step_is_right(course.trainee, course.twin)
        print(json.dumps({"left": left, "next step": right, "where": where}), flush=True)


@contextmanager
def working(*arguments: str) -> Generator[subprocess.Popen[str]]:
    """This module as a process of its own, which Ctrl-C in the terminal does not reach."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.reliability.test_reliability_signals", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    patience = threading.Timer(PATIENCE, worker.kill)
    patience.start()
    try:
        with worker:
            yield worker
    finally:
        patience.cancel()
        worker.kill()


def answer_of(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    assert line, f"the worker died, status {worker.wait()}"
    return line


def signalled(worker: subprocess.Popen[str], kind: str, number: int, after: float) -> Any:
    """What the worker says of one signal, sent so many seconds after it began to train."""
    assert worker.stdin is not None
    worker.stdin.write(f"{kind}\n")
    assert answer_of(worker) == "training\n"
    time.sleep(after)
    worker.send_signal(number)
    return json.loads(answer_of(worker))


def test_signals_lose_nothing(full: bool, counts: Counts) -> None:
    rng = random.Random(0)
    rounds = 60 if full else 2
    plan = [(kind, number) for kind in KINDS for number in SIGNALS] * rounds
    with working("signals") as worker:
        answers = [signalled(worker, kind, n, rng.uniform(0, 0.05)) for kind, n in plan]
    losses = [a for a in answers if a["left"] == "lost" or not a["next step"]]
    for (_, number), answer in zip(plan, answers, strict=True):
        within = answer["left"] == "within the base step"
        fault = "in the base's own step" if within else signal.Signals(number).name
        counts.add(f"real signal, {fault}", 1, answer in losses)
    assert not losses
    within_steps = [a for a in answers if "torch_booster/optimizer.py" in a["where"]]
    assert within_steps, "the signals were to arrive within steps"


# SIGKILL


def function_of_the_benchmark(name: str) -> Any:
    """A function of the benchmark's `runs` without its imports, which take ten seconds."""
    source = (ROOT / "benchmarks" / "harmful_finetuning" / "runs.py").read_text()
    nodes: list[ast.stmt] = [
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    ]
    chosen = [node for node in nodes if getattr(node, "name", "") == name]
    scope: dict[str, Any] = {
        "contextmanager": contextmanager,
        "Generator": Generator,
        "Path": Path,
        "shutil": shutil,
        "tempfile": tempfile,
    }
    exec(compile(ast.Module(chosen, []), "runs.py", "exec"), scope)
    return scope[name]


def save(course: Course, step: int, folder: Path) -> None:
    """Weights and optimizer state after a step."""
    from safetensors.torch import save_file

    names = map(str, range(len(course.trainee.params)))
    weights = dict(zip(names, course.trainee.snapshot().weights, strict=True))
    save_file(weights, folder / "weights.safetensors")
    torch.save(
        {"step": step, "optimizer": course.trainee.opt.state_dict()}, folder / "optimizer.pt"
    )


def load(folder: Path) -> tuple[int, Snapshot]:
    from safetensors.torch import load_file

    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    weights = load_file(folder / "weights.safetensors")
    ordered = [weights[str(i)] for i in range(len(weights))]
    return saved["step"], Snapshot(ordered, saved["optimizer"])


def save_without_end(course: Course, place: Path) -> None:
    """Trains and saves every step twice: as a new folder, and over the last file."""
    written_whole = function_of_the_benchmark("written_whole")
    course.restart()
    for step in range(1, len(course.states) - 1):
        course.trainee.step()
        with written_whole(place / f"step-{step}") as folder:
            save(course, step, folder)
        unfinished = place / "latest.unfinished"
        torch.save({"step": step, **course.trainee.snapshot()._asdict()}, unfinished)
        unfinished.replace(place / "latest.pt")
    signal.pause()


def killed(course: Course, place: Path, after: float) -> None:
    """Forks a process that saves and kills it so many seconds after its first checkpoint."""
    child = os.fork()
    if child == 0:
        try:
            save_without_end(course, place)
        finally:
            os._exit(1)
    while not (place / "latest.pt").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.001)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def losses_of(course: Course, place: Path) -> Iterator[str]:
    """Checkpoints that are torn, that nobody wrote, or that training cannot go on from."""
    folders = list(place.glob("step-*"))
    for folder in folders:
        try:
            step, found = load(folder)
        except Exception as error:
            yield f"{folder.name} does not load: {error!r}"
            continue
        if folder.name != f"step-{step}" or not found.equals(course.states[step]):
            yield f"{folder.name} is not what was saved"
    latest = torch.load(place / "latest.pt", weights_only=True)
    step, found = latest["step"], Snapshot(latest["weights"], latest["optimizer"])
    if not len(folders) - 1 <= step <= len(folders) or not found.equals(course.states[step]):
        yield f"latest.pt, of step {step}, is not what was saved"
    if not course.twin.stepped_from(found).equals(course.states[step + 1]):
        yield f"the step after {step} is another"


def answer_kills(where: str, kills: str, seed: str) -> None:
    """The nursery: forks savers, kills them and prints what was left of each."""
    torch.set_num_threads(1)
    rng = random.Random(int(seed))
    course = Course("one call", 40)
    for number in range(int(kills)):
        place = Path(where, str(number))
        place.mkdir()
        killed(course, place, rng.uniform(0, 0.05))
        unfinished = [p.name for p in place.iterdir() if "unfinished" in p.name]
        losses = list(losses_of(course, place))
        print(json.dumps({"lost": losses, "unfinished": unfinished}), flush=True)
        shutil.rmtree(place)


def test_a_kill_leaves_whole_checkpoints(tmp_path: Path, full: bool, counts: Counts) -> None:
    pytest.importorskip("safetensors", reason="the examples extra is absent")
    kills = 250 if full else 10
    with working("kills", str(tmp_path), str(kills), "0") as nursery:
        answers = [json.loads(answer_of(nursery)) for _ in range(kills)]
    for answer in answers:
        when = "while one is written" if answer["unfinished"] else "between two"
        counts.add(f"SIGKILL of a process that saves checkpoints, {when}", 1, bool(answer["lost"]))
    assert not [answer["lost"] for answer in answers if answer["lost"]]
    if full:
        assert any(answer["unfinished"] for answer in answers), "no kill met a save"


def test_only_the_rename_keeps_a_checkpoint_whole(tmp_path: Path) -> None:
    """Written in place, a file is cut where the kill falls, and the one before it is gone.

    What is cut does not load, with errors of many types, and so is at least not taken for whole.
    """
    pytest.importorskip("safetensors", reason="the examples extra is absent")
    course = Course("one call", 1)
    save(course, 0, tmp_path)
    for name in ("weights.safetensors", "optimizer.pt"):
        whole = (tmp_path / name).read_bytes()
        for cut in range(0, len(whole), len(whole) // 50):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(Exception):  # noqa: B017, PT011
                load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert load(tmp_path)[1].equals(course.trainee.snapshot())


if __name__ == "__main__":
    {"signals": answer_signals, "kills": answer_kills}[sys.argv[1]](*sys.argv[2:])
