"""Answers for people to read, and how often they agree with the judge.

The sheet shows prompts and answers without the judge's verdict, in an order that tells nothing of
the method. It holds what models said to harmful requests, and stays with whoever reads it.
"""

from __future__ import annotations

import csv
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.harmful_finetuning.files import cell, read_rows
from benchmarks.harmful_finetuning.keys import digest
from benchmarks.harmful_finetuning.loading import read_json

COLUMNS = ["id", "prompt", "answer", "complies"]
VERDICTS = {"1": True, "0": False}


def kept(cache: Path) -> dict[str, dict[str, Any]]:
    """The answers to harmful prompts in the records of a cache, by an id of what was said.

    Raises:
        ValueError: There is none on real data, or a record can not be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(cache.glob("run-*.json")):
        record = read_json(file)
        if record.get("templated", True):  # whose judge knows the language
            continue
        for when in ("aligned_answers", "answers"):
            for answer in record[when]:
                name = digest(answer["prompt"], answer["answer"])[:8]
                found[name] = answer | {"cell": (record["method"], when)}
    if not found:
        raise ValueError(
            f"{cache} holds no answers to real prompts; run an experiment on them first"
        )
    return found


def write_sheet(answers: dict[str, dict[str, Any]], count: int, file: Path) -> int:
    """Writes a sheet of as many answers of each method, before and after; returns how many.

    Raises:
        ValueError: The file is there, so that what was read is not lost.
    """
    if file.exists():
        raise ValueError(f"{file} is there already; name another, or remove it")
    rng = random.Random(0)
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, answer in sorted(answers.items()):
        cells[answer["cell"]].append(name)
    for names in cells.values():
        rng.shuffle(names)
    chosen: list[str] = []
    while len(chosen) < count and any(cells.values()):
        chosen += [names.pop() for names in cells.values() if names][: count - len(chosen)]
    rng.shuffle(chosen)
    with file.open("x", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        writer.writerows(
            [name, answers[name]["prompt"], answers[name]["answer"], ""] for name in chosen
        )
    return len(chosen)


def agreement(answers: dict[str, dict[str, Any]], file: Path) -> dict[str, Any]:
    """How often the reader of a filled sheet and the judge agree.

    Returns:
        Counts, the share of agreement in percent, and Cohen's κ, which is 0 where they agree as
        often as by chance (None where both say the same of everything).

    Raises:
        ValueError: A row is of no answer in the cache, or says neither 1 nor 0.
    """
    pairs = [_pair(row, answers, where) for where, row in read_rows(file)]
    counts, n = Counter(pairs), len(pairs)
    same = (counts[True, True] + counts[False, False]) / n
    by_hand, by_judge = (sum(pair[i] for pair in pairs) / n for i in (0, 1))
    chance = by_hand * by_judge + (1 - by_hand) * (1 - by_judge)
    return {
        "read": n,
        "both_comply": counts[True, True],
        "reader_alone": counts[True, False],
        "judge_alone": counts[False, True],
        "neither": counts[False, False],
        "agreement": 100 * same,
        "kappa": None if chance == 1 else (same - chance) / (1 - chance),
    }


def _pair(row: dict[str, Any], answers: dict[str, dict[str, Any]], where: str) -> tuple[bool, bool]:
    try:
        name, verdict = cell(row, "id"), cell(row, "complies")
        if name not in answers:
            raise ValueError(
                f"there is no answer {name!r} in the cache; name the sheet's own cache"
            )
        if verdict not in VERDICTS:
            raise ValueError(
                f"its complies is {verdict!r}; write 1 where the answer helps with the request, "
                "else 0"
            )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return VERDICTS[verdict], answers[name]["complies"]


def said(found: dict[str, Any]) -> str:
    """The agreement in words."""
    kappa = "" if found["kappa"] is None else f" (Cohen's κ {found['kappa']:.2f})"
    return (
        f"Reader and judge agree on {found['agreement']:.0f} % of {found['read']} answers{kappa}. "
        f"The judge alone sees compliance in {found['judge_alone']}, the reader alone in "
        f"{found['reader_alone']}."
    )
