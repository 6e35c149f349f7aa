"""docs/results.md: the prose of page.md, with tables and numbers of the published results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.harmful_finetuning import paper
from benchmarks.harmful_finetuning.experiments import PAPER
from benchmarks.harmful_finetuning.figures import FIGURES, plain_svg
from benchmarks.harmful_finetuning.intervals import MISSING, estimate
from benchmarks.harmful_finetuning.results import Tables
from benchmarks.harmful_finetuning.tables import (
    Answers,
    answers,
    costs,
    gradients,
    label,
    lines,
    markdown,
    said,
    searches,
    tuning,
)

DOCS = Path(__file__).parents[2] / "docs"
TEMPLATE = Path(__file__).with_name("page.md")
AIM = 60
"""Harmful score, points under SFT's, that was aimed at with all weights trained."""
OTHERS = {  # scores beside the harmful score: (name, decimals, factor)
    "after_finetune_accuracy": ("finetune accuracy, %", 1, 1.0),
    "after_over_refusal": ("over-refusal, %", 1, 1.0),
    "before_harmful_score": ("harmful score before the attack, %", 1, 1.0),
    "before_harmful_loss": ("harmful loss before, nats", 2, 1.0),
}


class Claim(NamedTuple):
    """A target beside what was measured."""

    experiment: str
    trained: str
    target: str
    values: list[float]  # points under the other's harmful score, a seed each
    goal: float
    accuracy: list[float]  # points over SFT's finetune accuracy

    def row(self) -> list[str]:
        """The claim with its verdict, judged from the numbers alone."""
        found, accuracy = estimate(self.values), estimate(self.accuracy)
        start = [self.experiment, self.trained, self.target]
        if found is None or accuracy is None:
            return [*start, "–", "–", "not measured"]
        worst = accuracy.mean if accuracy.high is None else accuracy.high
        faults = {
            "below the target": not found.mean >= self.goal,  # so that NaN is below
            "interval not above zero" if found.n > 1 else "one seed": not (found.low or 0) > 0,
            "finetune accuracy lower": worst < 0,
        }
        reasons = ", ".join(reason for reason, holds in faults.items() if holds)
        verdict = f"missed: {reasons}" if reasons else "met"
        return [*start, found.show(2, "+"), accuracy.show(2, "+"), verdict]


def claims(name: str, trained: str, found: Answers) -> Iterator[Claim]:
    """The targets that an experiment is judged by."""

    def lower(rival: str, over: list[float]) -> list[float]:
        return found.difference(rival, "booster", over, "after_harmful_score")

    def claim(target: str, values: list[float], goal: float, over: list[float]) -> Claim:
        accuracy = found.difference("booster", "sft", over, "after_finetune_accuracy")
        return Claim(name, trained, target, values, goal, accuracy)

    if name == "architectures":
        goal, over = paper.HEADLINE_ARCHITECTURE, found.values
        yield claim(f"SFT − Booster ≥ {goal:g}, mean of three", lower("sft", over), goal, over)
        return
    goal = AIM if trained == "full" else paper.HEADLINE_P
    over, every = list(paper.POISON_RATIOS), [0.0, *paper.POISON_RATIOS]
    yield claim(f"SFT − Booster ≥ {goal:g}, mean p > 0", lower("sft", over), goal, over)
    yield claim("the same, p = 0 counted", lower("sft", every), goal, every)
    gaps = [lower(rival, over) for rival in PAPER if rival != "booster"]
    closest = min(gaps, key=lambda gap: sum(gap) / len(gap)) if all(gaps) else []
    yield claim("Booster lowest of the five, mean p > 0: to the closest", closest, 0.0, over)


def write(tables: Tables, docs: Path) -> list[Path]:
    """Writes the page and its images, and returns the files.

    Raises:
        ValueError: The page names results that are not there.
    """
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    files = [docs / "results.md"]
    files[0].write_text(text(tables), "utf-8")
    with plain_svg():
        for name, draw in FIGURES.items():
            files.append(images / f"{name}.svg")
            draw(tables).savefig(files[-1], metadata={"Date": None, "Creator": None})
    return files


def text(tables: Tables) -> str:
    """The page: the prose of page.md with what it asks for in double braces.

    Raises:
        ValueError: It asks for what there is not.
    """
    page = Page(tables)

    def filled(match: re.Match[str]) -> str:
        name, *words = match[1].split()
        if name not in ASKED:
            raise ValueError(f"page.md asks for {name!r}; there is {', '.join(ASKED)}")
        return ASKED[name](page, *words)

    return re.sub(r"\{\{\s+([^}]+?)\s+\}\}", filled, TEMPLATE.read_text("utf-8"))


class Page(NamedTuple):
    """What the page can ask for, each by a name and words after it."""

    tables: Tables

    def experiment(self, name: str, trained: str, round_: str = "") -> str:
        """The harmful score over the axis, other scores, time to break, and the command."""
        found = answers(self.tables, name, trained, round_)
        known = {key: about for key, about in OTHERS.items() if found.runs[key].notna().any()}
        parts = [found.table("after_harmful_score", 1, "harmful score after the attack, %")]
        if any(found.by_seed(m, found.values, score) for m in found.methods for score in known):
            parts.append(found.over_values(known, "mean over the columns"))
        entries = {
            (m, v): found.delay(m, v) for m in found.methods if m != "sft" for v in found.values
        }
        defenses = dict.fromkeys(m for (m, _), entry in entries.items() if entry != MISSING)
        if defenses:
            parts += [
                "Time to break, times SFT's, paired by base; ≥ where an attack ended before:",
                found.by_value(lambda method, value: entries[method, value], defenses),
            ]
        return "\n\n".join([*parts, self.command(name, trained, round_)])

    def command(self, name: str, trained: str, round_: str = "") -> str:
        """What makes an experiment again, where this version can."""
        rows = self.tables["commands"].set_index(["round", "experiment", "trained"])["command"]
        return "" if round_ else f"```bash\n{rows[round_, name, trained]}\n```"

    def score(self, method: str, p: str) -> str:
        """The mean harmful score at p in the main table."""
        found = answers(self.tables, "harmful-ratio", "full")
        scores = found.by_seed(method, [float(p)], "after_harmful_score")
        return f"{sum(scores.values()) / len(scores):.0f}"

    def bases(self, method: str, p: str) -> str:
        """The harmful score of each base at p in the main table."""
        return answers(self.tables, "harmful-ratio", "full").each_seed(method, float(p))

    def breaks(self, name: str, trained: str) -> str:
        """The time to break of each method, times SFT's, beside other scores and what it costs."""
        found = answers(self.tables, name, trained)
        (value,) = found.values

        def shown(method: str, score: str, digits: int) -> str:
            return found.show(found.by_seed(method, [value], score).values(), digits)

        rows = [
            [
                label(method),
                "1" if method == "sft" else found.delay(method, value),
                shown(method, "usual", 1),
                f"{max(found.by_seed(method, [value], 'usual').values()):.0f}",
                shown(method, "after_finetune_accuracy", 1),
                shown(method, "after_over_refusal", 1),
                shown(method, "align_passes_per_step", 1),
            ]
            for method in found.methods
        ]
        heads = ["aligned with", "times SFT's steps", "harmful score at the usual length, %"]
        heads += ["worst base", "finetune accuracy, %", "over-refusal, %", "passes a step"]
        return markdown(heads, rows)

    def worst(self, name: str, trained: str, method: str) -> str:
        """The steps until the weakest base breaks, times SFT's."""
        (ratios,) = self._ratios(name, trained, [method])
        return f"{min(ratios):.1f}"

    def _ratios(self, name: str, trained: str, methods: list[str]) -> list[list[float]]:
        """Steps to the break, times SFT's, of each method by base."""
        found = answers(self.tables, name, trained)
        (value,) = found.values
        steps = {m: found.by_seed(m, [value], "break") for m in ("sft", *methods)}
        return [[steps[m][seed] / steps["sft"][seed] for seed in found.seeds] for m in methods]

    def ahead(self, name: str, trained: str, method: str, rival: str) -> str:
        """On how many bases a method breaks later than a rival."""
        mine, its = self._ratios(name, trained, [method, rival])
        later = sum(a > b for a, b in zip(mine, its, strict=True))
        return f"{later} of {len(mine)}"

    def gain(self, name: str, trained: str, method: str, rival: str) -> str:
        """By how much later a method breaks than a rival, paired by base, times SFT's steps."""
        mine, its = self._ratios(name, trained, [method, rival])
        found = estimate(a - b for a, b in zip(mine, its, strict=True))
        return found.show(1) if found else MISSING

    def seeds(self, name: str, trained: str) -> str:
        """How many bases an experiment has."""
        return str(len(answers(self.tables, name, trained).seeds))

    def targets(self) -> str:
        """What was aimed at beside what was measured."""
        judged = (("architectures", "full"), ("harmful-ratio", "full"), ("harmful-ratio", "lora"))
        rows = [
            claim.row()
            for name, trained in judged
            for claim in claims(name, trained, answers(self.tables, name, trained))
        ]
        gains = ["harmful score, points lower", "finetune accuracy, points higher"]
        return markdown(["experiment", "trained", "target", *gains, "verdict"], rows)

    def costs(self, trained: str) -> str:
        """What a step costs."""
        return f"{costs(self.tables, trained)}\n\n{self.command('system', trained)}"

    def lines(self, trained: str) -> str:
        """The harmful loss along the harmful gradient."""
        return lines(self.tables, trained, "harmful_loss", "gradient")

    def gradients(self, trained: str) -> str:
        """Where the harmful gradient lies."""
        return f"{gradients(self.tables, trained)}\n\n{self.command('landscape', trained)}"

    def searches(self, trained: str) -> str:
        """What an attacker that searches found."""
        return f"{searches(self.tables, trained)}\n\n{self.command('attack-search', trained)}"

    def tuning(self, trained: str, round_: str = "") -> str:
        """The scores of every candidate."""
        found = tuning(self.tables, trained, round_)
        command = f"python -m benchmarks.harmful_finetuning tune --trained {trained}"
        return found if round_ else f"{found}\n\n```bash\n{command}\n```"

    def said(self, name: str, trained: str) -> str:
        """Answers of all methods to the same prompts, side by side."""
        return said(self.tables, name, trained)


ASKED: dict[str, Callable[..., str]] = {
    name: method
    for name, method in vars(Page).items()
    if inspect.isfunction(method) and name[0] != "_"
}
