"""The examples for several processes give the numbers of one process, and go on where they stop.

One process runs within this one. Two are started by their launchers and stopped by Ctrl-C on
the way.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 120
LOG = ("--log_every", "1")


class Example(NamedTuple):
    name: str
    launcher: Sequence[str]  # starts it on two processes
    flags: Sequence[str]
    steps: int  # enough of them to be interrupted on the way
    rel: float


ACCELERATE = Example(
    "accelerate_multi_process",
    (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0"),
    ),
    ("--width", "16", "--batch_size", "5", *LOG),  # rows that two processes cannot share equally
    steps=30,
    rel=1e-5,
)
FSDP2 = Example(
    "fsdp2",
    ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    ("--dtype", "float64", *LOG),
    steps=40,
    rel=1e-10,
)
BOTH = pytest.mark.parametrize("example", [ACCELERATE, FSDP2], ids=lambda example: example.name)


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples are written for a process of their own; gives back what they change."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arguments(example: Example, folder: Path) -> list[str]:
    return [*example.flags, "--steps", str(example.steps), "--output_dir", str(folder)]


def run_here(example: Example, folder: Path) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return importlib.import_module(example.name).main(arguments(example, folder))


def launch(example: Example, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", *example.launcher, str(EXAMPLES / f"{example.name}.py")),
            *arguments(example, folder),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its processes then
        raise


def rows(folder: Path) -> list[dict[str, float]]:
    metrics = folder / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def saved_step(folder: Path) -> int:
    if (folder / "checkpoint.pt").exists():
        return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    return json.loads((folder / "state" / "progress.json").read_text())[0]


def assert_same_numbers(example: Example, folder: Path, expected: Path) -> None:
    actual_rows, expected_rows = rows(folder), rows(expected)
    assert [row["step"] for row in actual_rows] == list(range(1, example.steps + 1))
    for actual, wanted in zip(actual_rows, expected_rows, strict=True):
        assert actual == pytest.approx(wanted, rel=example.rel, abs=example.rel)


@BOTH
def test_two_processes_give_the_numbers_of_one(example: Example, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    process = launch(example, two)
    deadline = time.monotonic() + TIMEOUT
    while not ((two / "metrics.jsonl").exists() and len(rows(two)) >= 5):
        assert process.poll() is None, output(process)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text = output(process)
    assert "The same command goes on from there" in text, text
    assert 5 <= saved_step(two) < example.steps

    assert run_here(example, one) == 0
    assert run_here(example, two) == 0  # the state of two processes goes on in one
    assert_same_numbers(example, two, one)


@BOTH
def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here(example, one) == 0
    module = importlib.import_module(example.name)
    with monkeypatch.context() as patched:
        patched.setattr(module, "track", interrupted_at(3))
        assert run_here(example, two) == 130
    assert saved_step(two) == 4
    with (two / "metrics.jsonl").open("a") as file:  # of steps that a killed run had not saved
        file.write('{"step": 5}\n')
    assert run_here(example, two) == 0
    assert rows(two) == rows(one)


def interrupted_at(step: int) -> Callable[..., Iterator[int]]:
    def track(steps: range, *_: object, **__: object) -> Iterator[int]:
        for current in steps:
            if current == step:
                signal.raise_signal(signal.SIGINT)
            yield current

    return track


@BOTH
def test_help_names_the_command(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    module: ModuleType = importlib.import_module(example.name)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())  # some parsers fill the lines anew
    assert f"2 examples/{example.name}.py" in text
    assert "--lam" in text
