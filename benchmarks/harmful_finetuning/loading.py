"""Loading what may be broken: one line that names the file, the place in it and the remedy."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def loading(source: str | Path) -> Generator[None]:
    """Makes every error of a library that loads something a ValueError of one line.

    Raises:
        ValueError: Names what was to be loaded.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{source} can not be loaded, check its files: {reason}") from error


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: There is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check its path")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
            "save the file in that encoding"
        ) from error


def read_json(path: Path) -> Any:
    """The value in a json file.

    Raises:
        ValueError: Names the file, the line and the remedy.
    """
    return json_value(path, read_text(path))


def json_value(path: Path, text: str, first_line: int = 1) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: Names the file that it is from, the line and the remedy.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise ValueError(
            f"{path}, line {line}: this is no JSON ({reason}); mend or remove it"
        ) from error
