"""Runs the checks of a step on a device, or measures what a step costs there.

    python -m benchmarks.gpu check
    python -m benchmarks.gpu cost

Both print as they go and write their record after each part, so that what is known when time runs
out, or at Ctrl-C, is there. ``check`` ends with 1 if a check failed. With ``--device cpu`` the same
code runs at toy size, and what needs CUDA is skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import check, cost, jobs
from torch_booster import __version__

COMMANDS: dict[str, Any] = {"check": check, "cost": cost}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parsed(argv)
    patience = 1 if args.device == "cuda" else 20  # a rehearsal on a busy CPU is none of speed
    wanted = {
        name: job._replace(limit=patience * job.limit)
        for name, job in COMMANDS[args.command].jobs().items()
        if name in args.only
    }
    asked = ["--only", *args.only] if len(args.only) < len(COMMANDS[args.command].jobs()) else []
    command = ["python", "-m", "benchmarks.gpu", args.command, *asked, "--limit", f"{args.limit:g}"]
    about = {"command": command, "torch_booster": __version__}
    output = Path(args.output)
    try:
        record = jobs.run(wanted, args.device, args.limit, output, about)
    except KeyboardInterrupt:
        print(f"Interrupted. What was found by then is in {output}", flush=True)
        return 130
    if args.command == "cost":
        cost.show(record)
    counts = [result["status"] for result in record["jobs"]]
    said = ", ".join(f"{counts.count(status)} {status}" for status in dict.fromkeys(counts))
    print(f"{said}. Record: {output}", flush=True)
    return 0 if jobs.passed(record) else 1


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS))
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--limit", type=float, help="seconds for all (240, on the CPU 3600)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some parts alone")
    parser.add_argument("--output", help="the record (default: build/gpu/COMMAND.json)")
    args = parser.parse_args(argv)
    names = list(COMMANDS[args.command].jobs())
    args.only = names if args.only is None else args.only
    args.output = args.output or os.path.join("build", "gpu", f"{args.command}.json")
    if unknown := [name for name in args.only if name not in names]:
        parser.error(f"no part is called {unknown[0]!r}; there are: {', '.join(names)}")
    if args.limit is None:
        args.limit = 240.0 if args.device == "cuda" else 3600.0
    if args.limit <= 0:
        parser.error(f"--limit is {args.limit}, expected seconds above 0")
    if args.device == "cuda" and not has_cuda:
        parser.error("no CUDA device is there; --device cpu runs the same code at toy size")
    return args


if __name__ == "__main__":
    sys.exit(main())
