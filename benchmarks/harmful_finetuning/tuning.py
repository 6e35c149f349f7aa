"""Chooses every method's hyperparameters on the validation split, with the same budget for each.

Four settings of each method, on seeds that no reported run uses, by the harmful score after the
attack at p = 0.2; where two are equal, by the higher harmful loss. The attack itself was fixed
before, on SFT alone.

    python -m benchmarks.harmful_finetuning.tuning --trained full
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks.harmful_finetuning import grid
from benchmarks.harmful_finetuning.grid import Cell
from benchmarks.harmful_finetuning.settings import FULL, PRESETS, Settings
from lora_alignment import quieten_libraries

GRID: dict[str, list[dict[str, float]]] = {
    "sft": [{}],
    "lisa": [
        {"rho": 0.01, "alignment_steps": 100, "user_steps": 900},
        {"rho": 1.0, "alignment_steps": 100, "user_steps": 900},
        {"rho": 0.01, "alignment_steps": 10, "user_steps": 90},
        {"rho": 1.0, "alignment_steps": 10, "user_steps": 90},
    ],
    "repnoise": [
        {"alpha": 0.1, "beta": 0.001},
        {"alpha": 1.0, "beta": 0.001},
        {"alpha": 0.1, "beta": 0.1},
        {"alpha": 1.0, "beta": 0.1},
    ],
    "vaccine": [{"rho": 1.0}, {"rho": 2.0}, {"rho": 5.0}, {"rho": 10.0}],
    "booster": [
        {"lam": 1.0, "alpha": 0.1},
        {"lam": 5.0, "alpha": 0.1},
        {"lam": 1.0, "alpha": 0.3},
        {"lam": 2.0, "alpha": 0.2},
    ],
    "booster_warmed": [
        {"lam": 5.0, "alpha": 0.1, "warmup": 500},
        {"lam": 1.0, "alpha": 0.3, "warmup": 500},
        {"lam": 5.0, "alpha": 0.3, "warmup": 500},
        {"lam": 5.0, "alpha": 0.3, "warmup": 1000},
    ],
}
"""The grid: each method's published values and three around them.

Those of ``booster_warmed`` come from eight that were tried with LoRA on validation seed 101 alone.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--trained", choices=["lora", "full"], default="full")
    parser.add_argument(
        "--methods", nargs="+", choices=list(GRID), default=list(GRID), help="to tune"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101])
    parser.add_argument("--workers", type=int, default=2, help="processes that share the runs")
    parser.add_argument("--cache", default="~/.cache/torch_booster/benchmark")
    parser.add_argument("--output", default="tuning.json", help="where the scores go")
    args = parser.parse_args(argv)
    quieten_libraries()
    values = PRESETS[args.preset] | (FULL[args.preset] if args.trained == "full" else {})
    given = {"trained": args.trained, "split": "validation", "p": 0.2}
    settings = Settings(**values | given)
    settings = replace(settings, eval_every=settings.fine_tune_steps)
    cells = [
        Cell(method, seed, settings.given(method, **values), {"setting": values})
        for method in args.methods
        for values in GRID[method]
        for seed in args.seeds
    ]
    console = Console()
    cache = Path(args.cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            results = grid.run(cells, cache, args.workers, progress)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept: the same command goes on from them.")
        return 130
    rows = []
    for method in args.methods:
        for values in GRID[method]:
            found = [
                result
                for cell, result in zip(cells, results, strict=True)
                if cell.method == method and cell.vary["setting"] == values
            ]
            row = {"method": method, "setting": values, "seeds": args.seeds}
            for score in ("harmful_score", "harmful_loss", "finetune_accuracy", "over_refusal"):
                row[score] = [result["attacked"][score] for result in found]
            row["aligned_harmful_loss"] = [result["aligned"]["harmful_loss"] for result in found]
            rows.append(row)
            console.print(method, values, {k: mean(v) for k, v in row.items() if "_" in k})
    Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
