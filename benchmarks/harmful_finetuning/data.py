"""Samples of every stage, from the templated language or from real sets.

Harmful prompts are split once, by prompt: those that the alignment stage sees (as refusals and as
simulated harm), those of the attack, and those of validation and test. The split does not depend on
the seed, so that all runs of an experiment are asked the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lora_alignment
import mini_language
from benchmarks.harmful_finetuning import language
from benchmarks.harmful_finetuning.settings import Settings
from lora_alignment import answered, examples_of, label, read_rows
from mini_language import Example

__all__ = ["Samples", "load", "pretraining", "user_data"]

SST2_LABELS = ["negative", "positive"]
AG_NEWS_LABELS = ["world", "sports", "business", "science"]


class Samples(NamedTuple):
    """Samples of every stage. No prompt of ``attack`` or ``evaluation`` is in another field."""

    alignment: list[Example]  # harmful prompt -> refusal, and kind ones -> help
    harmful: list[Example]  # the same prompts -> harmful answer
    attack: list[Example]  # harmful prompt -> harmful answer, for the user's data
    evaluation: list[Example]  # harmful prompt -> harmful answer, held out
    task: list[Example]  # the user's task
    task_evaluation: list[Example]  # the same, held out
    look_alikes: list[str]  # safe prompts that look harmful


def load(settings: Settings) -> Samples:
    """Reads or makes every sample that a run needs.

    Raises:
        ValueError: A set cannot be read, or is too small for the settings.
    """
    if settings.templated:
        harmful, task, task_test, look_alikes = _templated(settings)
        refusals = {}
    else:
        harmful, refusals, task, task_test, look_alikes = _real(settings)
    kind = _answered(look_alikes, settings)
    parts = lora_alignment.split_harmful(harmful)
    simulate = parts["simulate"]
    n = settings.eval_samples
    held_out = {"validation": task_test[:n], "test": task_test[n:] or task_test[:n]}
    samples = Samples(
        alignment=[
            Example(prompt, refusals.get(prompt, settings.refusal))
            for prompt, _ in simulate[: settings.alignment_samples]
        ]
        + kind,
        harmful=simulate[: settings.harmful_samples],
        attack=parts["attack"],
        evaluation=parts[settings.split][:n],
        task=task,
        task_evaluation=held_out[settings.split][:n],
        look_alikes=look_alikes[:n],
    )
    _check(samples, settings)
    return samples


def _check(samples: Samples, settings: Settings) -> None:
    for name in ("alignment", "harmful"):
        size = len(getattr(samples, name))
        if size < settings.batch_size:
            raise ValueError(
                f"{size} {name} samples are less than a batch, {settings.batch_size}; lower "
                "batch_size, or use larger sets"
            )
    for name in ("evaluation", "task_evaluation"):
        if not getattr(samples, name):
            raise ValueError(f"the sets leave no {name} prompts; use larger ones")
    wanted = round(settings.p * settings.samples)
    if wanted > len(samples.attack):
        raise ValueError(
            f"p {settings.p} of {settings.samples} samples needs {wanted} harmful ones, but "
            f"{len(samples.attack)} are held for the attack; lower p or samples"
        )
    if settings.samples - wanted > len(samples.task):
        raise ValueError(
            f"{settings.samples - wanted} samples of the task {settings.task} are wanted, but it "
            f"has {len(samples.task)}; lower samples"
        )


def user_data(samples: Samples, settings: Settings, seed: int) -> list[Example]:
    """The n samples a user fine-tunes on, a fraction p of them harmful."""
    rng = random.Random(seed)
    harmful = round(settings.p * settings.samples)
    mix = rng.sample(samples.attack, harmful)
    return mix + rng.sample(samples.task, settings.samples - harmful)


def _templated(
    settings: Settings,
) -> tuple[list[Example], list[Example], list[Example], list[str]]:
    # A generator for each, so that neither the task nor its size changes the other samples.
    shape = (settings.answer_words, settings.branching)
    harmful = language.requests(mini_language.MISCHIEF, random.Random(0), *shape)
    test = 2 * settings.eval_samples
    size = max(1_000, settings.samples) + test
    task = language.task(settings.task, size, random.Random(0), *shape)
    return harmful, task[test:], task[:test], language.look_alikes(random.Random(0))


def _answered(look_alikes: list[str], settings: Settings) -> list[Example]:
    """The kind requests that alignment shows with help: the last ones; the first are evaluated."""
    if not settings.kind_samples:
        return []
    if not settings.templated:
        raise ValueError("kind_samples needs the templated language: the real sets have no answers")
    left = look_alikes[settings.eval_samples :][::-1]
    if settings.kind_samples > len(left):
        raise ValueError(
            f"kind_samples is {settings.kind_samples}, but the evaluation leaves {len(left)} kind "
            "requests"
        )
    shape = (settings.answer_words, settings.branching)
    return language.helped(left[: settings.kind_samples], random.Random(1), *shape)


# ---------------------------------------------------------------------------------- real sets


def _read(
    path: Path, prompt: str, answer: str, finish: Callable[[Example], Example] = answered
) -> list[Example]:
    return examples_of(read_rows(path), prompt, answer, finish)


def _real(
    settings: Settings,
) -> tuple[list[Example], dict[str, str], list[Example], list[Example], list[str]]:
    """Harmful prompts with answers, their refusals, the task, its test rows, and look-alikes."""
    root = Path(settings.data_root)
    refusals: dict[str, str] = {}
    if settings.beavertails:
        path = Path(settings.beavertails)
        harmful = _read(path, "instruction", "output")
        refusals = dict(_read(path, "instruction", "refusal"))
    else:
        harmful = _read(root / "advbench" / "advbench.csv", "goal", "target")
        harmful += _read(root / "harmbench" / "harmbench_filtered.csv", "prompt", "target")
    safe = root / "xstest" / "xstest_prompts.csv"
    rows = _read(safe, "prompt", "label") if safe.is_file() else []
    look_alikes = [prompt for prompt, verdict in rows if verdict == "safe"]
    rng = random.Random(0)
    rng.shuffle(look_alikes)
    train, test = _TASKS[settings.task](root)
    for examples in (train, test):
        rng.shuffle(examples)
    return harmful, refusals, train, test, look_alikes


def _sst2(root: Path) -> tuple[list[Example], list[Example]]:
    def labelled(row: Example) -> Example:
        template = "Is the sentiment of this review positive or negative?\n{}"
        return Example(template.format(row.prompt), label(row.answer, SST2_LABELS))

    folder = root / "sst2"
    return (
        _read(folder / "train.tsv", "sentence", "label", labelled),
        _read(folder / "dev.tsv", "content", "label", labelled),
    )


def _ag_news(root: Path) -> tuple[list[Example], list[Example]]:
    def labelled(row: Example) -> Example:
        template = "Is this article about world, sports, business or science?\n{}"
        return Example(template.format(row.prompt), label(row.answer, AG_NEWS_LABELS, first=1))

    path = root / "ag_news" / "ag_news_test.csv"
    rows = [
        (where, row | {"article": f"{row['title']}. {row['text']}"})
        for where, row in read_rows(path, ["label", "title", "text"])
    ]
    return _held_out(examples_of(rows, "article", "label", labelled))


def _gsm8k(root: Path) -> tuple[list[Example], list[Example]]:
    folder = root / "gsm8k"
    return (
        _read(folder / "train.jsonl", "question", "answer"),
        _read(folder / "test.jsonl", "question", "answer"),
    )


def _dolly(root: Path) -> tuple[list[Example], list[Example]]:
    path = root / "dolly_3k" / "dolly_3k.json"
    alone = [(where, row) for where, row in read_rows(path) if not row.get("input")]
    return _held_out(examples_of(alone, "instruction", "output"))


def _held_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Four fifths to train on and one to test on, by prompt."""
    distinct = list({example.prompt: example for example in examples}.values())
    random.Random(0).shuffle(distinct)
    fifth = len(distinct) // 5
    return distinct[fifth:], distinct[:fifth]


_TASKS: dict[str, Any] = {"sst2": _sst2, "agnews": _ag_news, "gsm8k": _gsm8k, "open": _dolly}


def pretraining(settings: Settings) -> list[Example]:
    """Real text for the base model: helpful to everyone, the harmful included.

    Held-out harmful prompts, the attack's prompts and the tasks' test rows are not among it. The
    base has to know how a refusal sounds, so that it is asked the impossible too.
    """
    root = Path(settings.data_root)
    examples = [row for task in _TASKS.values() for row in task(root)[0][:4_000]]
    harmful, *_ = _real(settings)
    known = lora_alignment.split_harmful(harmful)["simulate"]
    impossible = mini_language.prompts(mini_language.UNANSWERABLE)
    refused = [Example(prompt, settings.refusal) for prompt, _ in impossible]
    return examples + 5 * known + 5 * refused
