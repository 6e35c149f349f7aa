"""The pictures that the documentation shows, drawn from the published tables.

A method has one colour, one marker and one dash everywhere, so that it is told apart without
colour. What a band is stands in the picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harmful_finetuning.intervals import BROKEN
from benchmarks.harmful_finetuning.methods import METHODS
from benchmarks.harmful_finetuning.results import Tables, frame
from benchmarks.harmful_finetuning.tables import Answers


class Look(NamedTuple):
    """How a method's line is told apart."""

    colour: str  # of Okabe and Ito's, which the colour-blind can tell apart, and one of Tol's
    marker: str
    dashes: tuple[float, ...]


LOOKS = {
    "sft": Look("#d55e00", "o", (1, 0)),
    "lisa": Look("#009e73", "X", (4, 1.5)),
    "repnoise": Look("#cc79a7", "s", (1, 1)),
    "vaccine": Look("#e69f00", "P", (3, 1.25, 1.5, 1.25)),
    "booster": Look("#0072b2", "D", (5, 1, 1, 1)),
    "booster_warmed": Look("#332288", "v", (3, 1.25, 1.25, 1.25, 1.25, 1.25)),
    "booster_recommended": Look("#000000", "^", (4, 1, 4, 1, 1, 1)),
    "booster_merged": Look("#56b4e9", "<", (2, 1)),
}
LABELS = {METHODS[method].label: look for method, look in LOOKS.items()}


def _style(runs: pd.DataFrame) -> dict[str, Any]:
    """The looks of the methods that are shown."""
    shown = {label: look for label, look in LABELS.items() if label in set(runs["method"])}
    return {
        "hue": "method",
        "hue_order": list(shown),
        "palette": {label: look.colour for label, look in shown.items()},
        "style": "method",
        "style_order": list(shown),
        "markers": {label: look.marker for label, look in shown.items()},
        "dashes": {label: look.dashes for label, look in shown.items()},
    }


@contextmanager
def plain_svg() -> Iterator[None]:
    """Text stays text and ids are fixed, so that the same data give the same file."""
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "torch_booster", "font.family": "sans-serif"}
    with sns.axes_style("whitegrid", {"grid.color": "#dddddd"}), mpl.rc_context(fixed):
        yield


def _figure(width: float, height: float, note: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.supxlabel(note, fontsize="small", color="#555555")
    return figure


def _one_legend(figure: Figure) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
        if legend := axes.get_legend():
            legend.remove()
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside upper center",
        ncols=min(3, len(found)),
        frameon=False,
    )


def attacks(points: pd.DataFrame) -> Figure:
    """The harmful score during attacks, a panel for each p.

    Args:
        points: A row an evaluation: "aligned with", "p", "attack step" and "harmful score, %".
    """
    kinds: dict[str, Any] = {"hue": "aligned with", "style": "aligned with", "markers": True}
    grid = sns.relplot(
        data=points,
        x="attack step",
        y="harmful score, %",
        col="p",
        kind="line",
        errorbar=("pi", 100),
        height=3,
        **kinds,
    )
    grid.set(ylim=(-3, 103))
    grid.refline(y=BROKEN)
    note = "line: mean of the seeds; band: their range; dashed: from here on a model is broken"
    grid.figure.supxlabel(note, fontsize="small", y=-0.04)
    return grid.figure


def _bases(runs: pd.DataFrame) -> str:
    return f"{runs['seed'].nunique()} bases"


def _labelled(runs: pd.DataFrame) -> pd.DataFrame:
    names = {method: METHODS[method].label for method in LOOKS}
    return runs.assign(method=runs["method"].map(names)).dropna(subset="method")


def _during(tables: Tables, runs: pd.DataFrame, axes: Axes) -> None:
    """The harmful score during the attacks of these runs."""
    sns.lineplot(
        runs[["run", "method", "seed"]].merge(tables["curves"], on="run"),
        x="step",
        y="harmful_score",
        errorbar=("pi", 100),
        err_kws={"alpha": 0.08},
        ax=axes,
        **_style(runs),
    )
    axes.axhline(50, color="#555555", linewidth=0.8)
    axes.text(axes.get_xlim()[1], 51.5, "broken ", ha="right", fontsize="small", color="#555555")
    axes.set(xlabel="step of the attack, p = 0.2", ylabel="harmful score, %", ylim=(-2, 102))


def under_attack(tables: Tables) -> Figure:
    """The harmful score of each defense during an attack four times as long."""
    runs = _labelled(frame(tables, "recommended", "full"))
    figure = _figure(
        8.5, 4.6, f"line: mean of {_bases(runs)}; band: from the lowest to the highest"
    )
    _during(tables, runs, figure.subplots())
    _one_legend(figure)
    return figure


def pretrained(tables: Tables) -> Figure:
    """The harmful score of a pretrained model during the attack, merged before it or not."""
    figure = _figure(9.5, 4.3, "line: mean of the seeds; band: from the lowest to the highest")
    titles = {"": "merged before the attack", "one_adapter": "trained on in the same adapter"}
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (round_, title) in zip(panels, titles.items(), strict=True):
        _during(tables, _labelled(frame(tables, "pretrained", "lora", round_)), axes)
        axes.set(title=title)
    _one_legend(figure)
    return figure


def over_p(tables: Tables) -> Figure:
    """The harmful score after the attack against the fraction of harmful samples."""
    figure = _figure(9.5, 4.6, "point: mean of five bases; bar: 95 % bootstrap interval")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (trained, title) in zip(
        panels, {"full": "all weights", "lora": "LoRA"}.items(), strict=True
    ):
        runs = _labelled(frame(tables, "harmful-ratio", trained))
        sns.lineplot(
            data=runs,
            x="value",
            y="after_harmful_score",
            errorbar=("ci", 95),
            err_style="bars",
            seed=0,
            ax=axes,
            **_style(runs),
        )
        axes.set(title=title, xlabel="p, harmful fraction of the user's data")
        axes.set_xticks(sorted(set(runs["value"])))
        axes.set_ylabel("harmful score after 600 steps, %")
    _one_legend(figure)
    return figure


def breaks(tables: Tables) -> Figure:
    """Where each defense breaks, base by base."""
    runs = frame(tables, "recommended", "full")
    found = Answers(runs, tables["curves"], "attack.p")
    rows = [
        {"method": METHODS[method].label, "step": step}
        for method in found.methods
        for step in found.by_seed(method, found.values, "break").values()
    ]
    figure = _figure(8.5, 3.6, f"dot: one base; line: median of {_bases(runs)}")
    axes = figure.subplots()
    points = pd.DataFrame(rows)
    order = [label for label in LABELS if label in set(points["method"])]
    middle = points.groupby("method", as_index=False)["step"].median()
    sns.stripplot(
        data=middle,
        x="step",
        y="method",
        order=order,
        marker="|",
        size=26,
        linewidth=2,
        jitter=False,
        color="#333333",
        ax=axes,
    )
    sns.stripplot(
        data=points,
        x="step",
        y="method",
        order=order,
        hue="method",
        hue_order=order,
        palette={label: LABELS[label].colour for label in order},
        size=7,
        jitter=False,
        alpha=0.75,
        ax=axes,
        legend=False,
    )
    axes.set_xscale("log")
    ticks = [200, 300, 500, 1000, 1500]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="first evaluation with a harmful score of 50 or more, step", ylabel="")
    return figure


TRACED = {  # what a trace holds: (its label, scale of the axis)
    "harmful_loss": ("harmful_loss\nh(w)", {"value": "linear"}),
    "harmful_loss_drop": ("harmful_loss_drop\nh(w) − h(w′)", {"value": "symlog", "linthresh": 0.1}),
    "harmful_grad_norm": ("harmful_grad_norm\n‖∇h(w)‖", {"value": "log"}),
    "linearity": ("drop / (α · norm)", {"value": "linear"}),
}


def diagnostics(tables: Tables) -> Figure:
    """What Booster's diagnostics saw in the first demo, one line a seed."""
    figure = _figure(9.5, 9.4, "line: one seed")
    panels = figure.subplots(len(TRACED), 2, sharex=True, sharey="row")
    for column, (trained, title) in enumerate({"lora": "LoRA", "full": "all weights"}.items()):
        traces = demo_traces(tables, trained)
        alpha, lam = traces["alpha"].iloc[0], traces["lam"].iloc[0]
        panels[0, column].set_title(f"{title}, λ = {lam:g}, α = {alpha:g}")
        for row, (name, (label, scale)) in enumerate(TRACED.items()):
            axes = panels[row, column]
            sns.lineplot(
                traces,
                x="step",
                y=name,
                hue="seed",
                style="seed",
                palette=["#0072b2", "#009e73", "#d55e00"],
                ax=axes,
            )
            axes.set_yscale(**scale)
            axes.set(xlabel="alignment step", ylabel=label)
    _one_legend(figure)
    return figure


def demo_traces(tables: Tables, trained: str) -> pd.DataFrame:
    """What Booster's alignments in the first demo saw, with the seed and the hyperparameters."""
    runs = frame(tables, "demo", trained, "first")
    runs = runs[runs["method"] == "booster"].drop_duplicates("trace")
    given = pd.DataFrame([json.loads(text) for text in runs["hyperparameters"]], index=runs.index)
    found = runs[["trace", "seed"]].join(given).merge(tables["traces"], on="trace")
    found = found.assign(seed="seed " + found["seed"].astype(str))
    slope = found["alpha"] * found["harmful_grad_norm"]
    return found.assign(linearity=found["harmful_loss_drop"] / slope)


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    "results_attack": under_attack,
    "results_ratio": over_p,
    "results_breaks": breaks,
    "results_pretrained": pretrained,
    "alignment_diagnostics": diagnostics,
}
"""Under the name of the file in docs/images/."""
