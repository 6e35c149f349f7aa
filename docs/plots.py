"""Draws docs/images/ from the recorded runs in benchmarks/results/.

python docs/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
COLOURS = ("#0072b2", "#009e73", "#d55e00")  # told apart by colour-blind readers too
DASHES = ("-", "--", ":")  # and on paper

# Text stays text and ids are fixed, so that the same data give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "torch_booster", "font.family": "sans-serif"}


class Panel(NamedTuple):
    """One quantity over the alignment steps."""

    label: str
    scale: dict[str, Any]


PANELS = {
    "harmful_loss": Panel("harmful_loss\nh(w)", {"value": "linear"}),
    "harmful_loss_drop": Panel(
        "harmful_loss_drop\nh(w) − h(w′)", {"value": "symlog", "linthresh": 0.1}
    ),
    "harmful_grad_norm": Panel("harmful_grad_norm\n‖∇h(w)‖", {"value": "log"}),
    "linearity": Panel("drop / (α · norm)", {"value": "linear"}),
}


def traces(record: dict[str, Any]) -> dict[int, list[dict[str, float]]]:
    """Diagnostics of each seed's Booster run, one row for every recorded alignment step."""
    alpha = record["arguments"]["alpha"]
    return {
        run["seed"]: [
            row | {"linearity": row["harmful_loss_drop"] / (alpha * row["harmful_grad_norm"])}
            for row in run["alignment"]
        ]
        for run in record["results"]
        if run["p"] is None and run["method"] == "booster"
    }


def draw_diagnostics(target: Path) -> None:
    """LoRA on the left, all weights on the right, one line for each seed."""
    columns = {"LoRA": "demo_lora.json", "all weights": "demo_full.json"}
    figure = Figure(figsize=(9.5, 9), layout="constrained")
    axes = figure.subplots(len(PANELS), 2, sharex=True, sharey="row")
    for column, (title, name) in enumerate(columns.items()):
        record = json.loads((RESULTS / name).read_text())
        arguments = record["arguments"]
        axes[0, column].set_title(f"{title}, λ = {arguments['lam']:g}, α = {arguments['alpha']:g}")
        for axis, (key, panel) in zip(axes[:, column], PANELS.items(), strict=True):
            lines = zip(traces(record).items(), COLOURS, DASHES, strict=True)
            for (seed, rows), colour, dashes in lines:
                steps, values = [r["step"] for r in rows], [r[key] for r in rows]
                style = {"color": colour, "linestyle": dashes, "linewidth": 1.4}
                axis.plot(steps, values, label=f"seed {seed}, one batch a point", **style)
            axis.set_yscale(**panel.scale)
            axis.grid(alpha=0.3, linewidth=0.5)
        axes[-1, column].set_xlabel("alignment step")
    for axis, panel in zip(axes[:, 0], PANELS.values(), strict=True):
        axis.set_ylabel(panel.label)
    axes[0, 1].legend(frameon=False)
    figure.savefig(target, metadata={"Date": None, "Creator": None})


def main(folder: Path = IMAGES) -> None:
    """Writes every image."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        draw_diagnostics(folder / "alignment_diagnostics.svg")


if __name__ == "__main__":
    main()
