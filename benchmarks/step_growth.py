"""How the cost of a Booster step grows: with weights, tensors, LoRA rank and sequence length.

One quantity at a time is doubled, the others held. For weights and tensors the closures write
gradients without a model, so that what a step takes beyond its three passes shows; for rank and
length they run a Llama stack with the paper's adapter, and the step is compared with a plain one.
The floor (three passes and the base step), Booster and a plain step take turns in every round.

Over the last three octaves of each curve a power law is fitted: an exponent of 1 means that what
is doubled doubles the cost, 0 that it does not matter.

    python benchmarks/step_growth.py
    python benchmarks/step_growth.py --axes elements tensors --rounds 30
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.live_memory import peak_bytes
from benchmarks.step_cost import (
    Closure,
    Problem,
    arithmetic,
    beyond,
    booster,
    floor,
    in_turn,
    lora,
    over,
    parsed,
    parser_of,
    plain,
    write,
)

CONTESTANTS: dict[str, Callable[[Problem], Closure]] = {
    "floor": floor,
    "booster": booster,
    "plain": plain,
}


class Axis(NamedTuple):
    """One quantity to double, and the training at each of its values."""

    title: str
    values: Sequence[int]
    problem: Callable[[int, str], Problem]
    with_model: bool


AXES = {
    "elements": Axis(
        "trainable weights in 64 tensors",
        [2**k for k in range(16, 26)],
        lambda n, device: arithmetic(64, n // 64, device, ""),
        False,
    ),
    "tensors": Axis(
        "tensors, of 2²⁰ weights in all",
        [2**k for k in range(4, 13)],
        lambda n, device: arithmetic(n, 2**20 // n, device, ""),
        False,
    ),
    "rank": Axis(
        "LoRA rank",
        [2**k for k in range(2, 8)],
        lambda r, device: lora(device, "small", rank=r),
        True,
    ),
    "length": Axis(
        "tokens in a sequence",
        [2**k for k in range(4, 9)],
        lambda n, device: lora(device, "small", length=n),
        True,
    ),
}


def measure(
    axis: Axis, value: int, args: argparse.Namespace, advance: Callable[[], None]
) -> dict[str, Any]:
    """Times and memory of every contestant at one point of an axis."""
    problems = {name: axis.problem(value, args.device) for name in CONTESTANTS}
    steps = {name: contestant(problems[name]) for name, contestant in CONTESTANTS.items()}
    trainable = problems["floor"].trainable_bytes()
    seconds = in_turn(steps, args, advance)
    peaks: dict[str, int] = {}
    for name in ("floor", "booster"):
        problems[name].module.zero_grad()
        peaks[name] = peak_bytes(steps[name], args.device)
    return {
        "value": value,
        "trainable_bytes": trainable,
        "extra_memory": (peaks["booster"] - peaks["floor"]) / trainable,
        "contestants": {name: {"seconds": taken} for name, taken in seconds.items()},
    }


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost against log value, by least squares, over the last four points.

    NaN where a cost is not positive, as a difference within the noise may be.

    Example:
        >>> round(exponent([1, 2, 4, 8], [3, 6, 12, 24]), 6)
        1.0
    """
    pairs = zip(values[-4:], costs[-4:], strict=True)
    x, y = torch.tensor(list(pairs), dtype=torch.float64).log().T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def summary(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Every point of every axis."""
    view = Table(title="Growth of a step's cost")
    for head in ("axis", "value", "ms beyond the floor", "step / floor", "step / plain step"):
        view.add_column(head, justify="left" if head == "axis" else "right")
    view.add_column("extra memory", justify="right")
    for name, points in results.items():
        for point in points:
            view.add_row(
                name,
                f"{point['value']:,}",
                f"{1e3 * beyond(point, 'booster'):.3f}",
                f"{over(point, 'booster', 'floor'):.3f}",
                f"{over(point, 'booster', 'plain'):.2f}",
                f"{point['extra_memory']:.2f} x",
                end_section=point is points[-1],
            )
    return view


def exponents(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The power of each quantity in the cost: of the step, or beyond the floor without a model."""
    found = {}
    for name, points in results.items():
        if len(points) > 1:
            costs = [
                statistics.median(point["contestants"]["booster"]["seconds"])
                if AXES[name].with_model
                else beyond(point, "booster")
                for point in points
            ]
            found[name] = exponent([point["value"] for point in points], costs)
    return found


def draw(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """One panel an axis: milliseconds of a step, or of what it takes beyond the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (name, points) in zip(panels, results.items(), strict=True):
        values = [point["value"] for point in points]
        if AXES[name].with_model:
            for label in CONTESTANTS:
                taken = [
                    statistics.median(point["contestants"][label]["seconds"]) for point in points
                ]
                panel.plot(values, [1e3 * t for t in taken], marker="o", markersize=3, label=label)
        else:
            beyond_floor = [1e3 * beyond(point, "booster") for point in points]
            panel.plot(values, beyond_floor, marker="o", markersize=3, label="beyond the floor")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(AXES[name].title)
        panel.set_ylabel("ms a step")
        panel.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--points", type=int, default=0, help="of each axis, from the smallest")
    parser.add_argument("--output", default="step_growth.json", help="raw times; a PNG beside it")
    args = parsed(parser, argv)
    if args.points < 0:
        parser.error("--points must not be negative")

    console = Console()
    chosen = {name: AXES[name].values[: args.points or None] for name in args.axes}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    total = sum(map(len, chosen.values())) * (args.rounds + args.warm_up)
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("rounds", total=total)
            advance = partial(progress.advance, task)
            for name, values in chosen.items():
                for value in values:
                    results[name].append(measure(AXES[name], value, args, advance))
                    gc.collect()
    except KeyboardInterrupt:
        console.print("Interrupted: nothing is written, since a part of a comparison is none.")
        return 130
    powers = exponents(results)
    write(args, argv, "step_growth.py", {"exponents": powers, "results": results})
    draw(results, Path(args.output).with_suffix(".png"))
    console.print(summary(results), {name: round(power, 2) for name, power in powers.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
