"""Samples of every stage: of the templated language, of real sets, or of a user's own.

Harmful prompts are split once, by prompt: those that the alignment stage sees (as refusals and as
simulated harm), those of the attack, and those of validation and test. Prompts that differ in case,
punctuation or spaces alone are one. The split does not depend on the seed, so that all runs of an
experiment are asked the same.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harmful_finetuning import language
from benchmarks.harmful_finetuning.files import (
    SUFFIXES,
    Finish,
    Row,
    answered,
    cell,
    examples_of,
    hub_rows,
    label,
    read_rows,
)
from benchmarks.harmful_finetuning.language import Example
from benchmarks.harmful_finetuning.settings import Settings, Source

SST2_LABELS = ["negative", "positive"]
AG_NEWS_LABELS = ["world", "sports", "business", "science"]


class Samples(NamedTuple):
    """Samples of every stage. No prompt of ``attack`` or an evaluation is in another field."""

    alignment: list[Example]  # harmful prompt -> refusal, and kind ones -> help
    harmful: list[Example]  # the same prompts -> harmful answer
    attack: list[Example]  # harmful prompt -> harmful answer, for the user's data
    evaluation: list[Example]  # harmful prompt -> harmful answer, held out
    task: list[Example]  # the user's task
    task_evaluation: list[Example]  # the same, held out
    look_alikes: list[str]  # safe prompts that look harmful
    kind_evaluation: list[Example]  # kind requests with people's answers, held out


class Sets(NamedTuple):
    """What samples are made of, wherever it comes from."""

    harmful: list[Example]
    refusals: list[Example]  # harmful prompts with refusals of their own, where there are any
    task: list[Example]
    task_test: list[Example]
    look_alikes: list[str]
    kind: Sequence[Example] = ()  # kind requests with people's answers
    attack: Sequence[Example] = ()  # further harmful samples for the attack alone


def load(settings: Settings) -> Samples:
    """Reads or makes every sample that a run needs.

    Raises:
        ValueError: A set cannot be read, or is too small for the settings.
    """
    data, n = settings.data, settings.score.samples
    if data.harmful.set:
        sets = _own(settings)
    else:
        sets = _templated(settings) if settings.templated else _real(settings)
    parts = split_harmful(without(sets.harmful, sets.attack))
    simulate, attack, asked = parts["simulate"], parts["attack"], parts[settings.score.split]
    if data.simulated_kinds:
        simulate = language.about(simulate, language.MISCHIEF[: data.simulated_kinds])
    if data.attacked_kinds:
        kinds = language.MISCHIEF[-data.attacked_kinds :]
        attack, asked = language.about(attack, kinds), language.about(asked, kinds)
    kind = without(distinct(sets.kind), _named(sets.look_alikes), sets.harmful, sets.attack)
    tests = {"validation": sets.task_test[:n], "test": sets.task_test[n:] or sets.task_test[:n]}
    samples = Samples(
        alignment=_refusals(settings, sets, parts)[: data.alignment_samples]
        + (_last(kind, settings) if kind else _templated_kind(sets, settings)),
        harmful=simulate[: data.harmful_samples],
        attack=distinct(sets.attack) + attack,
        evaluation=asked[:n],
        task=sets.task,
        task_evaluation=tests[settings.score.split][:n],
        look_alikes=sets.look_alikes[:n],
        kind_evaluation=kind[:n],
    )
    _check(samples, settings)
    return samples


def split_harmful(examples: list[Example]) -> dict[str, list[Example]]:
    """Splits the harmful set by prompt: 45 % simulate, 25 % attack, 10 % validation, 20 % test."""
    found = distinct(examples)
    random.Random(0).shuffle(found)
    bounds = [round(len(found) * share) for share in (0.45, 0.7, 0.8, 1.0)]
    names = ("simulate", "attack", "validation", "test")
    return {
        name: found[start:end]
        for name, start, end in zip(names, [0, *bounds], bounds, strict=False)
    }


def normalised(prompt: str) -> str:
    """The words of a prompt, by which prompts are told apart."""
    return " ".join(re.findall(r"\w+", prompt.casefold())) or prompt


def distinct(examples: Iterable[Example]) -> list[Example]:
    """One example of each prompt, the last."""
    return list({normalised(example.prompt): example for example in examples}.values())


def without(examples: Iterable[Example], *others: Iterable[Example]) -> list[Example]:
    """The examples whose prompts are not among those of others."""
    known = {normalised(example.prompt) for example in itertools.chain(*others)}
    return [example for example in examples if normalised(example.prompt) not in known]


def _refusals(settings: Settings, sets: Sets, parts: dict[str, list[Example]]) -> list[Example]:
    """Harmful prompts with refusals: those of the simulation, or a set of its own."""
    if settings.data.refusals.set:
        held = [e for name in ("attack", "validation", "test") for e in parts[name]]
        return without(sets.refusals, held)
    own = {normalised(prompt): refusal for prompt, refusal in sets.refusals}
    usual = itertools.cycle(settings.data.refusal)
    return [
        Example(prompt, own.get(normalised(prompt)) or next(usual))
        for prompt, _ in parts["simulate"]
    ]


def _check(samples: Samples, settings: Settings) -> None:
    for name in ("alignment", "harmful"):
        size = len(getattr(samples, name))
        if size < settings.align.batch_size:
            raise ValueError(
                f"{size} {name} samples are less than a batch, {settings.align.batch_size}; lower "
                "align.batch_size, or use larger sets"
            )
    for name in ("evaluation", "task_evaluation"):
        if not getattr(samples, name):
            raise ValueError(f"the sets leave no {name} prompts; use larger ones")
    p, n = settings.attack.p, settings.attack.samples
    wanted = round(p * n)
    if wanted > len(samples.attack):
        raise ValueError(
            f"attack.p {p} of {n} samples needs {wanted} harmful ones, but {len(samples.attack)} "
            "are held for the attack; lower attack.p or attack.samples"
        )
    if n - wanted > len(samples.task):
        raise ValueError(
            f"{n - wanted} samples of the user's task are wanted, but it has {len(samples.task)}; "
            "lower attack.samples"
        )


def user_data(samples: Samples, settings: Settings, seed: int) -> list[Example]:
    """The n samples a user fine-tunes on, a fraction p of them harmful."""
    rng = random.Random(seed)
    harmful = round(settings.attack.p * settings.attack.samples)
    mix = rng.sample(samples.attack, harmful)
    return mix + rng.sample(samples.task, settings.attack.samples - harmful)


# ---------------------------------------------------------------------- the templated language


def _templated(settings: Settings) -> Sets:
    # A generator for each, so that neither the task nor its size changes the other samples.
    shape = (settings.data.answer_words, settings.data.branching)
    harmful = language.requests(language.MISCHIEF, random.Random(0), *shape)
    test = 2 * settings.score.samples
    size = max(1_000, settings.attack.samples) + test
    task = language.task(settings.data.task, size, random.Random(0), *shape)
    return Sets(harmful, [], task[test:], task[:test], language.look_alikes(random.Random(0)))


def _templated_kind(sets: Sets, settings: Settings) -> list[Example]:
    """The kind requests that alignment shows with help: the last ones; the first are evaluated."""
    if not settings.data.kind_samples:
        return []
    if not settings.templated:
        raise ValueError(
            "data.kind_samples needs kind requests with answers, which these sets do not have; set "
            "0, data.real paper or data.kind.set"
        )
    shape = (settings.data.answer_words, settings.data.branching)
    return language.helped(_last(sets.look_alikes, settings), random.Random(1), *shape)


def _last(kind: list[Any], settings: Settings) -> list[Any]:
    wanted, left = settings.data.kind_samples, kind[settings.score.samples :][::-1]
    if wanted > len(left):
        raise ValueError(
            f"data.kind_samples is {wanted}, but the evaluation leaves {len(left)} kind requests; "
            "lower it, or score.samples"
        )
    return left[:wanted]


def _named(prompts: Iterable[str]) -> list[Example]:
    return [Example(prompt, "") for prompt in prompts]


# ------------------------------------------------------------------------------ a user's own


def _own(settings: Settings) -> Sets:
    data = settings.data

    def task_row(example: Example) -> Example:
        answer = answered(example).answer
        return Example(
            data.user_template.replace("{prompt}", example.prompt),
            label(answer, data.labels) if data.labels else answer,
        )

    def refusal_row(example: Example) -> Example:
        return Example(example.prompt, example.answer or data.refusal[0])

    harmful = read_source(data.harmful, "harmful")
    refusals = read_source(data.refusals, "refusals", refusal_row) if data.refusals.set else []
    task = read_source(data.user, "user", task_row)
    random.Random(0).shuffle(task)
    if data.user_test.set:
        test = read_source(data.user_test, "user_test", task_row)
        random.Random(0).shuffle(test)
    else:
        held = 2 * settings.score.samples
        task, test = task[held:], task[:held]
    kind = read_source(data.kind, "kind") if data.kind.set else []
    random.Random(0).shuffle(kind)
    alone = replace(data.look_alikes, answer="")
    safe = read_source(alone, "look_alikes", lambda example: example) if alone.set else []
    return Sets(harmful, refusals, task, test, [example.prompt for example in safe], kind)


def read_source(source: Source, flag: str, finish: Finish = answered) -> list[Example]:
    """A set on the hub or in a file, as examples.

    Args:
        source: Where it is, and its columns.
        flag: Its name among the flags, for error messages.
        finish: Makes the final example of one that was read, or raises ValueError.

    Raises:
        ValueError: No such set, file type or column, no rows, or a row that is no example.
    """
    path = Path(source.set)
    remedies = (f"set --data.{flag}.prompt or add it", f"set --data.{flag}.answer or add it")
    try:
        local = path.is_file() or path.suffix.lower() in SUFFIXES
        rows = read_rows(path) if local else hub_rows(source.set, source.split)
        return examples_of(rows, source.prompt, source.answer or None, finish, remedies)
    except ValueError as error:
        raise ValueError(f"--data.{flag}.set {error}") from error


# ---------------------------------------------------------------------------------- real sets


def _read(path: Path, prompt: str, answer: str, finish: Finish = answered) -> list[Example]:
    return examples_of(read_rows(path), prompt, answer, finish)


def _real(settings: Settings) -> Sets:
    if settings.data.real == "paper":
        return _paper(settings)
    root, beavertails = Path(settings.data.root), Path(settings.data.beavertails)
    refusals: list[Example] = []
    if settings.data.beavertails:
        harmful = _read(beavertails, "instruction", "output")
        refusals = _read(beavertails, "instruction", "refusal")
    else:
        harmful = _read(root / "advbench" / "advbench.csv", "goal", "target")
        harmful += _read(root / "harmbench" / "harmbench_filtered.csv", "prompt", "target")
    rng = random.Random(0)
    look_alikes = _look_alikes(root)
    rng.shuffle(look_alikes)
    train, test = _TASKS[settings.data.task](root)
    for examples in (train, test):
        rng.shuffle(examples)
    return Sets(harmful, refusals, train, test, look_alikes)


def _look_alikes(root: Path) -> list[str]:
    safe = root / "xstest" / "xstest_prompts.csv"
    rows = _read(safe, "prompt", "label") if safe.is_file() else []
    return [prompt for prompt, verdict in rows if verdict == "safe"]


def _paper(settings: Settings) -> Sets:
    """BeaverTails, the paper's own mixture, people's answers from Dolly and XSTest's prompts."""
    root, longest = Path(settings.data.root), settings.data.longest_prompt
    if settings.data.task != "sst2":
        raise ValueError(f"data.real paper has the task sst2 alone, not {settings.data.task}")

    def fits(example: Example) -> bool:
        return not longest or len(example.prompt.split()) <= longest

    mixture = root / "paper_attack"
    attack = _read(mixture / "harmful.json", "prompt", "answer")
    harmful = _read(root / "beavertails_unsafe" / "unsafe.json", "prompt", "response")
    rows = [(where, row | {"both": _asked(row)}) for where, row in read_rows(mixture / "sst2.json")]
    train = examples_of(rows, "both", "answer")
    instruction = cell(rows[0][1], "prompt")
    dev = _read(
        root / "sst2" / "dev.tsv",
        "content",
        "label",
        lambda row: Example(f"{instruction}\n{row.prompt}", label(row.answer, SST2_LABELS)),
    )
    kind = [example for part in _dolly(root) for example in part]
    parts = [list(filter(fits, part)) for part in (harmful, train, dev, kind, attack)]
    rng, look_alikes = random.Random(0), _look_alikes(root)
    rng.shuffle(look_alikes)
    harmful, train, dev, kind, attack = map(distinct, parts)
    for part in (train, dev, kind, attack):
        rng.shuffle(part)
    return Sets(harmful, [], train, without(dev, train), look_alikes, kind, attack)


def _asked(row: Row) -> str:
    """An instruction with its input, as in the paper's mixture."""
    return f"{cell(row, 'prompt')}\n{cell(row, 'input')}"


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
    found = distinct(examples)
    random.Random(0).shuffle(found)
    fifth = len(found) // 5
    return found[fifth:], found[:fifth]


_TASKS: dict[str, Any] = {"sst2": _sst2, "agnews": _ag_news, "gsm8k": _gsm8k, "open": _dolly}


def pretraining(settings: Settings) -> list[Example]:
    """Real text for the base model: helpful to everyone, the harmful included.

    Held-out harmful prompts, the attack's prompts and the tasks' test rows are not among it. The
    base has to know how a refusal sounds, so that it is asked the impossible too.
    """
    root = Path(settings.data.root)
    examples = [row for task in _TASKS.values() for row in task(root)[0][:4_000]]
    known = split_harmful(_real(settings).harmful)["simulate"]
    impossible = language.prompts(language.UNANSWERABLE)
    refused = [Example(prompt, settings.data.refusal[0]) for prompt, _ in impossible]
    return examples + 5 * known + 5 * refused
