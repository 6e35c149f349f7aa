"""Runs the paper's experiments and writes their tables, plots and report.

An experiment is a grid of runs: a defense aligns a model, a user fine-tunes it on a task of which a
fraction p of the samples are harmful, and the harmful score, the finetune accuracy and the
over-refusal are measured before, during and after. Finished stages are kept under --cache: the same
command goes on where it was stopped.

    python -m benchmarks.harmful_finetuning harmful-ratio --preset small --trained full
    python -m benchmarks.harmful_finetuning all --preset quick
    python -m benchmarks.harmful_finetuning harmful-ratio --preset paper --dry_run \
        --config benchmarks/harmful_finetuning/configs/llama2_7b.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from transformers import HfArgumentParser

from benchmarks.harmful_finetuning import grid, landscape, report, system
from benchmarks.harmful_finetuning.experiments import EXPERIMENTS, MEASUREMENTS, Request
from benchmarks.harmful_finetuning.methods import METHODS
from benchmarks.harmful_finetuning.settings import FULL, PRESETS, TUNED, Settings, read_config
from lora_alignment import HelpFormatter, quieten_libraries, read_json, shown_on

NEED_PRETRAINING = {"architectures", "width"}
NEED_LANGUAGE = {"answer-length", "entropy", "kind-samples"}
ALL = EXPERIMENTS | MEASUREMENTS
MEASURE = {"landscape": landscape.measure, "system": system.measure}
OTHERS = (*MEASURE, "pretrain", "report", "all")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    console = Console()
    quieten_libraries()
    parser = _parser()
    try:
        settings, options = _parsed(parser, argv)
    except ValueError as error:
        parser.error(str(error))
    cache, output = Path(options.cache).expanduser(), Path(options.output)
    request = Request(settings, options.seeds, options.methods, options.preset == "quick")
    names = list(ALL) if options.experiment == "all" else [options.experiment]
    fixed = NEED_PRETRAINING if settings.model else set[str]()  # it has the size that it has
    if not settings.templated:
        fixed = fixed | NEED_LANGUAGE
    names = [name for name in names if name not in fixed]
    if not names:
        needed = "a pretrained base" if options.experiment in NEED_PRETRAINING else "the templates"
        parser.error(
            f"{options.experiment} varies {needed}; run it without --model, --data_root, "
            "--beavertails or a config that sets them"
        )
    if options.dry_run:
        return _dry_run(names, request, console)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        if options.experiment == "report":
            return _report(output, console)
        cache.mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=console) as progress:
            if "pretrain" in names:
                for seed in options.seeds:
                    cell = grid.Cell("sft", seed, settings, {})
                    grid.pretrain(cell, cache, shown_on(progress))
            for name, cells in _run(names, request, cache, options.workers, progress).items():
                _write(output, name, options, argv, cells)
        return 0 if options.experiment == "pretrain" else _report(output, console)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept: the same command goes on from them.")
        return 130
    except (OSError, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2


def _parser() -> Any:
    parser = HfArgumentParser(
        [Settings],  # pyright: ignore[reportArgumentType]
        prog="python -m benchmarks.harmful_finetuning",
        formatter_class=HelpFormatter,
        description=__doc__,
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, *OTHERS], help="what to run")
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="sizes of a run")
    parser.add_argument("--config", default="", help="JSON file of settings, over the preset's")
    parser.add_argument(
        "--methods", nargs="+", default=[], choices=list(METHODS), help="instead of the usual ones"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="seeds")
    parser.add_argument(
        "--workers",
        type=int,
        default=1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1),
        help="processes that share the runs",
    )
    parser.add_argument(
        "--cache", default="~/.cache/torch_booster/benchmark", help="where finished stages are kept"
    )
    parser.add_argument(
        "--output", default="harmful_finetuning", help="where results, plots and report go"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the runs and stop")
    return parser


def _parsed(parser: Any, argv: list[str]) -> tuple[Settings, argparse.Namespace]:
    """Command line over config over the preset's choices over the paper's defaults."""
    first, _ = parser.parse_known_args(argv)
    known = PRESETS[first.preset]
    if first.trained == "full":
        known = known | FULL[first.preset]
    if first.config:
        known = known | read_config(Path(first.config))
    parser.set_defaults(**known)
    settings, options = parser.parse_args_into_dataclasses(argv)
    if not settings.templated:
        parser.set_defaults(kind_samples=0)  # real sets have no answered kind requests
        settings, options = parser.parse_args_into_dataclasses(argv)
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}, expected at least 1")
    if not options.config:
        tuned = TUNED.get((options.preset, settings.trained), [])
        settings = Settings(
            **asdict(settings) | {"hyperparameters": [*tuned, *settings.hyperparameters]}
        )
    return settings, options


def _run(
    names: list[str], request: Request, cache: Path, workers: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """The results of each experiment; runs that experiments share are run once."""
    cells = {name: EXPERIMENTS[name].cells(request) for name in names if name in EXPERIMENTS}
    results = iter(
        grid.run([c for group in cells.values() for c in group], cache, workers, progress)
    )
    found = {name: [next(results) for _ in group] for name, group in cells.items()}
    show = shown_on(progress)
    for name in names:
        if name in MEASUREMENTS:
            found[name] = MEASURE[name](MEASUREMENTS[name].cells(request), cache, show)
    return found


def _write(
    output: Path,
    name: str,
    options: argparse.Namespace,
    argv: list[str],
    cells: list[dict[str, Any]],
) -> None:
    """Writes an experiment's results, whole or not at all."""
    experiment = ALL[name]
    trained = cells[0]["trained"]
    result = {
        "experiment": name,
        "title": experiment.title,
        "axis": experiment.axis,
        "note": experiment.note,
        "preset": options.preset,
        "command": shlex.join(
            ["python", "-m", "benchmarks.harmful_finetuning", *_reproducing(argv)]
        ),
        "cells": cells,
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}-{trained}.json"
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(file)


def _reproducing(argv: list[str]) -> list[str]:
    """The command line without the folders of this machine."""
    places = {i for i, word in enumerate(argv) if word in ("--cache", "--output")}
    return [word for i, word in enumerate(argv) if i not in places and i - 1 not in places]


def _report(output: Path, console: Console) -> int:
    """Makes the tables, plots and the HTML report of all results in the folder."""
    files = [read_json(file) for file in sorted(output.glob("*.json"))]
    results = [result for result in files if isinstance(result, dict) and "experiment" in result]
    if not results:
        console.print(f"[red]error:[/] there are no results in {output}", highlight=False)
        return 2
    for result in results:
        if result["experiment"] == "qualitative":
            text = report.qualitative(result)
        else:
            text = report.markdown(result)
        (output / f"{result['experiment']}-{result['cells'][0]['trained']}.md").write_text(text)
    (output / "targets.md").write_text(report.targets(results))
    console.print(f"tables, plots and report: {report.html(results, output)}")
    return 0


def _dry_run(names: list[str], request: Request, console: Console) -> int:
    for name in names:
        if name in ALL:
            cells = ALL[name].cells(request)
            methods = ", ".join(dict.fromkeys(cell.method for cell in cells))
            model = request.settings.model or f"small {request.settings.architecture}"
            console.print(f"{name}: {len(cells)} runs of {model}: {methods}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
