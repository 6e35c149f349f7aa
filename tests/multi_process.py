"""Runs many cases in one set of processes; a case that fails reports the rank's traceback.

Starting a process costs seconds (it imports torch), so that a module starts its set once. A rank
that raises leaves the others waiting in a collective: their timeout ends the wait, and every
later case of that set is reported as not run.
"""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)

Case = Callable[[int], None]  # rank -> raises on failure


def run_cases(
    cases: Mapping[str, Case], world_size: int, backend: str = "gloo"
) -> dict[str, str | None]:
    """Runs every case on `world_size` processes.

    Args:
        cases: Importable functions that take the rank and raise where they fail.
        world_size: Number of processes.
        backend: "gloo" on the CPU; "nccl" with one GPU for each process, as default device.

    Returns:
        None for each case that passed, else a text with the traceback of every rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(
                _worker,
                (world_size, folder, dict(cases), backend),
                nprocs=world_size,
                start_method="spawn",
            )
            died = ""
        except Exception:  # a signal in process-group teardown, after the results were written
            died = traceback.format_exc()
        outcomes: dict[str, str | None] = {}
        for name in cases:
            files = [Path(folder, f"{name}-{rank}") for rank in range(world_size)]
            missing = [rank for rank, file in enumerate(files) if not file.exists()]
            texts = [pickle.loads(file.read_bytes()) for file in files if file.exists()]
            failures = [text for text in texts if text is not None]
            if missing:
                failures.append(f"not run on ranks {missing}, after an earlier failure\n{died}")
            outcomes[name] = "\n".join(failures) if failures else None
        return outcomes


def _worker(rank: int, world_size: int, folder: str, cases: dict[str, Case], backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(rank)
            outcome = None
        except BaseException:
            outcome = f"rank {rank}:\n{traceback.format_exc()}"
        Path(folder, f"{name}-{rank}").write_bytes(pickle.dumps(outcome))
        if outcome is not None and not _together(outcome):
            os._exit(1)  # the others may be waiting for this rank
    dist.barrier()
    dist.destroy_process_group()


def _together(outcome: str) -> bool:
    """Whether the failure came after the last collective, so that all ranks can go on."""
    return "AssertionError" in outcome
