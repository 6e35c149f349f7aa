"""What putting the weights back leaves of them, after many Booster steps that change nothing else.

A Booster step moves the weights to w′ and back. The library copies w and restores the copy; the
method's published code subtracts the perturbation and adds it again, as it is written here from
its description. In floating point (w − d) + d is not always w. With a base optimizer of learning
rate zero and a new harmful batch in every round, whatever differs from the first weights is drift.

    python benchmarks/drift.py
    python benchmarks/drift.py --steps 1000 --output build/drift.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from torch_booster import BoosterOptimizer

LAM, ALPHA = 5.0, 0.1
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WIDTH, BATCH = 32, 8
Closure = Callable[[], Tensor]
Round = Callable[[Closure], None]


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name without torch's."""
    return str(dtype).removeprefix("torch.")


def restored(model: nn.Module) -> Round:
    """The library's way: a Booster step of learning rate zero, f and h being the same."""
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), LAM, ALPHA)

    def move_and_restore(closure: Closure) -> None:
        opt.zero_grad()
        opt.step(closure, closure)

    return move_and_restore


def added_back(model: nn.Module) -> Round:
    """The published code's way; its second pass, which leaves the weights alone, is left out."""

    def move_and_add(closure: Closure) -> None:
        model.zero_grad()
        closure()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        n = torch.stack([g.float().norm() for g in grads]).norm()
        moves = [(ALPHA * g / n).to(g.dtype) for g in grads]
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)

    return move_and_add


WAYS: dict[str, Callable[[nn.Module], Round]] = {"restored": restored, "added back": added_back}


def model_of(dtype: torch.dtype, seed: int) -> nn.Module:
    """Two layers with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def closure_on(model: nn.Module, batch: Tensor) -> Closure:
    """Forward and backward on one batch of inputs and targets."""

    def closure() -> Tensor:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def points(steps: int) -> list[int]:
    """Rounds at which to measure: about eight in each decade, and the last."""
    return sorted({round(10 ** (k / 8)) for k in range(64)} & set(range(steps)) | {steps})


def drift(
    dtype: torch.dtype,
    way: str,
    steps: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """How far the weights are from where they began.

    Args:
        dtype: Of the weights.
        way: Key of ``WAYS``.
        steps: Rounds of moving away and back.
        seed: Of weights and batches.
        advance: Called after each round.

    Returns:
        For some of the rounds ‖w − w₀‖ / ‖w₀‖ and the share of weights that are not as they were.
    """
    model = model_of(dtype, seed)
    move = WAYS[way](model)
    generator = torch.Generator().manual_seed(seed + 1)
    first = flat(model.parameters())
    measured = set(points(steps))
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Rounding to torch.bfloat16 moved")
        for step in range(1, steps + 1):
            batch = torch.randn(2, BATCH, WIDTH, generator=generator).to(dtype)
            move(closure_on(model, batch))
            if step in measured:
                now = flat(model.parameters())
                away = float((now.double() - first.double()).norm() / first.double().norm())
                moved = float((now != first).float().mean())
                setting = {"dtype": name_of(dtype), "way": way, "round": step}
                rows.append({**setting, "drift": away, "moved": moved})
            advance()
    return rows


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all weights as one vector."""
    return torch.cat([t.detach().flatten() for t in tensors]).clone()


# --------------------------------------------------------------------------------- presentation


def table(rows: list[dict[str, Any]]) -> Table:
    """The last round of every dtype and way."""
    last = max(row["round"] for row in rows)
    view = Table(title=f"Weights after {last:,} rounds")
    for head in ("dtype", "way", "drift", "weights moved"):
        view.add_column(head, justify="left" if head in ("dtype", "way") else "right")
    for row in rows:
        if row["round"] == last:
            numbers = f"{row['drift']:.2g}", f"{row['moved']:.1%}"
            view.add_row(row["dtype"], row["way"], *numbers)
    return view


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws the drift over the rounds; a linear strip at the bottom has room for zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    colours = dict(zip(map(name_of, DTYPES), ("#0072b2", "#009e73", "#d55e00"), strict=True))
    for (dtype, colour), (way, line) in (
        (pair, style)
        for style in zip(reversed(WAYS), ("-", ":"), strict=True)
        for pair in reversed(colours.items())
    ):
        chosen = [row for row in rows if row["dtype"] == dtype and row["way"] == way]
        values = [row["drift"] for row in chosen]
        label = f"{dtype}, {way}" + (": 0" if not any(values) else "")
        axis.plot([row["round"] for row in chosen], values, line, color=colour, label=label)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1e-18, linscale=0.5)
    axis.set_ylim(-2e-19, 10)
    axis.set_yticks([0.0, *(10.0**k for k in range(-18, 1, 3))])
    axis.set(xlabel="Booster steps of learning rate 0", ylabel="‖w − w₀‖ / ‖w₀‖")
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="rounds of each dtype and way")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument(
        "--output", type=Path, default=Path("drift.json"), help="JSON; a PNG goes beside it"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")

    console = Console()
    rows: list[dict[str, Any]] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            for dtype in DTYPES:
                for way in WAYS:
                    bar = progress.add_task(f"{name_of(dtype)}, {way}", total=args.steps)
                    advance = lambda bar=bar: progress.advance(bar)  # noqa: E731
                    rows += drift(dtype, way, args.steps, args.seed, advance)
    except KeyboardInterrupt:
        console.print("Interrupted: nothing is written, since a part of a comparison is none.")
        return 130
    record = {
        "command": f"python benchmarks/drift.py --steps {args.steps} --seed {args.seed}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()}
        | {"torch_booster": version("torch_booster")},
        "lam": LAM,
        "alpha": ALPHA,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))
    console.print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
