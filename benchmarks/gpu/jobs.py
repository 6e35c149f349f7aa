"""Jobs one after the other in a process beside this one, each with a time limit of its own.

A job that fails, hangs or takes its process with it (a device that has met an illegal access serves
that process no more) is recorded, and the next one starts in a new process. What is known is on
disk after each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Job", "Keep", "Skipped", "passed", "run"]

STARTING = 120.0  # seconds in which a process imports torch and finds its device
TRACEBACK = 4_000  # characters of it that are kept
Record = dict[str, Any]
Keep = Callable[[Record], None]
"""Given to a job, to be called with what it has found so far."""


class Skipped(Exception):  # noqa: N818, it is no error
    """Raised by a job that has nothing to find here, with the reason."""


class Job(NamedTuple):
    """What to do, and for how many seconds at most."""

    function: Callable[[str, float, Keep], Record]
    """takes the device, the seconds that it has and where to put what it has found so far"""
    limit: float


def run(jobs: Mapping[str, Job], device: str, limit: float, output: Path, about: Record) -> Record:
    """Runs all jobs, and writes the record after each.

    Args:
        jobs: By their names.
        device: "cuda" or "cpu".
        limit: Seconds for all of them; those that it leaves no time for are not run.
        output: Where the record goes.
        about: What the record says beside.

    Returns:
        The record, whose ``jobs`` have a name, a status, seconds and what was found. A status is
        passed, failed, timed out, skipped or not run.
    """
    ends = time.monotonic() + limit
    results: list[Record] = []
    record: Record = {**about, "device": {}, "jobs": results}
    worker: _Worker | None = None
    _write(record, output)  # what can not be written is told before anything is run
    try:
        for number, (name, job) in enumerate(jobs.items(), 1):
            result: Record = {"name": name, "status": "not run", "seconds": 0.0}
            results.append(result)
            if ends - time.monotonic() > 1:
                _tell(f"[{number}/{len(jobs)}] {name} ...")
                try:
                    worker = worker or _Worker(device, record)
                    seconds = min(job.limit, ends - time.monotonic())
                    worker.do(job, device, seconds, result, lambda: _write(record, output))
                except _NoAnswerError as lost:
                    result |= {"status": lost.status, "error": str(lost)}
                if worker is not None and result["status"] not in ("passed", "skipped"):
                    worker.kill()
                    worker = None
            _write(record, output)
            _tell(f"[{number}/{len(jobs)}] {name}: {_in_words(result)}")
    except BaseException:  # Ctrl-C: there is nothing to wait for
        if worker is not None:
            worker.kill()
        raise
    if worker is not None:
        worker.end()
    return record


def passed(record: Record) -> bool:
    """Whether every job that could be run passed."""
    return all(result["status"] in ("passed", "skipped") for result in record["jobs"])


class _NoAnswerError(Exception):
    """The process has not answered."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Worker:
    """A process that does jobs."""

    def __init__(self, device: str, record: Record) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, device))
        self._process.start()
        theirs.close()  # so that the end of the process is an end of file
        try:
            kind, value = self._next(STARTING)
        except _NoAnswerError:
            self.kill()
            raise
        if kind != "ready":
            self.kill()
            raise _NoAnswerError("failed", value["error"])
        record["device"] = value

    def do(
        self, job: Job, device: str, limit: float, result: Record, save: Callable[[], None]
    ) -> None:
        """Has a job done and enters what came of it."""
        start = time.monotonic()
        self._connection.send((job.function, device, limit))
        try:
            while True:
                kind, value = self._next(start + limit - time.monotonic())
                result |= value
                if kind == "done":
                    return
                save()
        finally:
            result["seconds"] = round(time.monotonic() - start, 2)

    def _next(self, limit: float) -> tuple[str, Record]:
        if not self._connection.poll(max(0.0, limit)):
            raise _NoAnswerError("timed out", f"no answer within {limit:.0f} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join(10)
            code = self._process.exitcode
            raise _NoAnswerError("failed", f"its process ended with exit code {code}") from None

    def end(self) -> None:
        """Lets the process end by itself."""
        self._connection.close()
        self._process.join(10)
        self.kill()

    def kill(self) -> None:
        """Ends the process and those that it has started."""
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no group of its own yet, or is gone
            self._process.kill()
        self._process.join(10)
        self._connection.close()


def _work(connection: Connection, device: str) -> None:
    os.setsid()  # a group of its own: Ctrl-C is the parent's, and children end with this one
    try:
        connection.send(("ready", _described(device)))
    except Exception:
        connection.send(("failed", {"error": traceback.format_exc()[-TRACEBACK:]}))
        return
    while True:
        try:
            function, device, limit = connection.recv()
        except EOFError:
            return
        outcome: Record
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            try:
                found = function(device, limit, lambda found: connection.send(("partly", found)))
                outcome = {"status": "passed", **found}
            except Skipped as reason:
                outcome = {"status": "skipped", "reason": str(reason)}
            except Exception:
                outcome = {"status": "failed", "error": traceback.format_exc()[-TRACEBACK:]}
        told = [f"{w.category.__name__}: {w.message}"[:300] for w in warned]
        if told:  # of other libraries' versions too, so that they fail nothing
            outcome["warnings"] = list(dict.fromkeys(told))
        connection.send(("done", outcome))


def _described(device: str) -> Record:
    about: Record = {
        "name": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "triton")},
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        about |= {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "bytes": total,
            "free_bytes": free,
            "cuda": torch.version.cuda,
        }
    return about


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _in_words(result: Record) -> str:
    said = f"{result['status']} in {result['seconds']:.1f} s"
    if "reason" in result:
        return f"{said}: {result['reason']}"
    if "error" in result:
        return f"{said}\n{result['error'].rstrip()}"
    return said


def _tell(line: str) -> None:
    print(line, flush=True)


def _write(record: Record, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1, allow_nan=True) + "\n")
    unfinished.replace(output)
