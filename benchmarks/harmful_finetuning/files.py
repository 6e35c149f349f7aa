"""Rows of prompts and answers from local files and from the hub.

What is wrong with a file is said with its name, the line or row, and the remedy. Text is kept as it
is written: `NA`, `007` and `2020-01-01` are words.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harmful_finetuning.language import Example
from benchmarks.harmful_finetuning.loading import json_value, loading, read_text

SUFFIXES = {".json", ".jsonl", ".csv", ".tsv"}
LONGEST = 131_072  # characters of a cell; more are rather a quote that was never closed
Row = dict[str, Any]
Finish = Callable[[Example], Example]


def read_rows(path: Path, header: list[str] | None = None) -> list[tuple[str, Row]]:
    """Rows of a local json, jsonl, csv or tsv file, each with its place for error messages.

    Args:
        path: The file.
        header: Columns of a csv or tsv file whose first line does not name them.

    Raises:
        ValueError: Names the file, the place in it and the remedy.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a json, jsonl, csv or tsv file")
    text = read_text(path)
    table = path.suffix.lower() in {".csv", ".tsv"}
    rows = _table_rows(path, text, header) if table else _json_rows(path, text)
    if not rows:
        raise ValueError(f"{path}: it has no rows; give it some, or name another file")
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[str, Row]]:
    # Not `datasets`, which makes a date of a text that looks like one and knows no lines.
    if text.lstrip().startswith("["):
        items = [(f"{path}, row {n}", item) for n, item in enumerate(json_value(path, text), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)  # str.splitlines also splits within strings
        items = [(f"{path}, line {n}", json_value(path, x, n)) for n, x in lines if x.strip()]
    for where, item in items:
        if not isinstance(item, dict):
            raise ValueError(
                f"{where}: this is of type {type(item).__name__}; expected an array of objects, or "
                "one object a line"
            )
    return items


def _table_rows(path: Path, text: str, header: list[str] | None) -> list[tuple[str, Row]]:
    quoting: Any = csv.QUOTE_NONE if path.suffix.lower() == ".tsv" else csv.QUOTE_MINIMAL
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            quoting=quoting,
        )
    except pd.errors.EmptyDataError:
        return []
    except pd.errors.ParserError as error:
        raise ValueError(
            f"{path}: {str(error).strip()}; quote cells that hold separators, close quotes and "
            "double those within"
        ) from error
    cells = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    names, first = (header, 1) if header else (cells.pop(0), 2)
    if len(set(names)) < len(names):
        raise ValueError(f"{path}, row 1: two columns have one name; rename one")
    if len(names) != table.shape[1]:
        raise ValueError(f"{path}: {table.shape[1]} cells a row, but {len(names)} columns")
    places = (f"{path}, row {number}" for number in range(first, first + len(cells)))
    return [
        (place, dict(zip(names, row, strict=True)))
        for place, row in zip(places, cells, strict=True)
    ]


def cell(row: Row, column: str, remedy: str = "add it") -> str:
    """The stripped text in a column of a row, which may be empty.

    Raises:
        ValueError: No such column, or something in it that is no text.
    """
    if column not in row:
        raise ValueError(f"there is no column {column!r} but {list(row)}; {remedy}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise ValueError(f"its {column!r} is a {kind}, expected text; mend or remove the row")
    text = str(value).strip()
    if len(text) > LONGEST:
        raise ValueError(
            f"its {column!r} has {len(text):,} characters, more than {LONGEST:,}; shorten it or "
            "remove the row"
        )
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"its {column!r} holds half a character (a surrogate); mend the row")
    return text


def answered(example: Example) -> Example:
    """The example, if it has an answer.

    Raises:
        ValueError: It has none.
    """
    if not example.answer:
        raise ValueError("its answer is empty; fill it in or remove the row")
    return example


def label(answer: str, words: list[str] | tuple[str, ...], first: int = 0) -> str:
    """The word that a number stands for.

    Raises:
        ValueError: It stands for none.
    """
    numbers = {str(number): word for number, word in enumerate(words, first)}
    if answer not in numbers:
        raise ValueError(
            f"its label {answer!r} is none of {', '.join(numbers)}, which stand for {list(words)}; "
            "mend or remove the row"
        )
    return numbers[answer]


def examples_of(
    rows: list[tuple[str, Row]],
    prompt: str,
    answer: str | None,
    finish: Finish = answered,
    remedies: tuple[str, str] = ("add it", "add it"),
) -> list[Example]:
    """Rows as examples.

    Args:
        rows: Each with its place.
        prompt: Column of prompts.
        answer: Column of answers; None leaves the answers empty.
        finish: Makes the final example of one that was read, or raises ValueError.
        remedies: What to do where one of the columns is missing.

    Raises:
        ValueError: Names the place of the row.
    """
    examples: list[Example] = []
    for where, row in rows:
        try:
            asked = cell(row, prompt, remedies[0])
            if not asked:
                raise ValueError(f"its {prompt!r} is empty; fill it in or remove the row")
            replied = "" if answer is None else cell(row, answer, remedies[1])
            examples.append(finish(Example(asked, replied)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return examples


def hub_rows(source: str, split: str) -> list[tuple[str, Row]]:
    """Rows of a set on the hub, or of any that `datasets` loads by its name.

    Raises:
        ValueError: Names the set.
    """
    from datasets import Dataset, load_dataset  # pyright: ignore[reportMissingTypeStubs]

    with loading(source):  # the many errors of hub, network and parsers
        found = load_dataset(source, split=split)
    assert isinstance(found, Dataset)
    rows: list[tuple[str, Any]] = [(f"{source}, row {n}", row) for n, row in enumerate(found, 1)]
    if not rows:
        raise ValueError(f"{source}: its split {split} has no rows")
    return rows
