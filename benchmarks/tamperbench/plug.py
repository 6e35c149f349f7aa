"""Names the defense and the attack in a clone of TamperBench, which has no other way to find them.

Its names are an enumeration and its modules register themselves where they are imported, so that a
new one takes a line in `names.py`, a line of import and a folder of YAML, as its CONTRIBUTING says.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).parent / "configs"
SOURCE = Path("src") / "tamperbench" / "whitebox"


class Line(NamedTuple):
    """A line for a file of the clone."""

    file: Path
    text: str
    after: str = ""  # the line that it follows; empty: the last


LINES = (
    Line(
        SOURCE / "utils" / "names.py",
        '    TORCH_BOOSTER = "torch_booster"',
        '    BOOSTER = "booster"',
    ),
    Line(
        SOURCE / "utils" / "names.py",
        '    SST2_BEAVERTAILS_FINETUNE = "sst2_beavertails_finetune"',
        '    LORA_FINETUNE = "lora_finetune"',
    ),
    Line(
        SOURCE / "defenses" / "__init__.py",
        "import benchmarks.tamperbench.defense  # noqa: E402, F401",
    ),
    Line(
        SOURCE / "attacks" / "__init__.py",
        "import benchmarks.tamperbench.attack  # noqa: E402, F401",
    ),
)


REMEDY = (
    "is no name of this TamperBench; run `python -m benchmarks.tamperbench plug CLONE`, or add it "
    "to the enumeration in whitebox/utils/names.py"
)


def plug(clone: Path) -> list[str]:
    """Adds what is missing, and leaves what is there.

    Args:
        clone: Folder of a clone of TamperBench.

    Returns:
        A line for each change.

    Raises:
        ValueError: The clone is laid out otherwise. Nothing is changed then.
    """
    texts = {line.file: _read(clone, line.file) for line in LINES}
    changes: list[str] = []
    for file, line, after in LINES:
        found = texts[file]
        if line in found:
            continue
        if after and found.count(after) != 1:
            raise ValueError(
                f"{clone / file} has the line {after.strip()!r} {found.count(after)} times instead "
                f"of once; add {line.strip()!r} to the enumeration by hand"
            )
        place = found.index(after) + 1 if after else len(found)
        found.insert(place, line)
        changes.append(f"{file}: {line.strip()}")
    for file, lines in texts.items():
        (clone / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in ("attacks", "defenses"):
        for folder in (CONFIGS / kind).iterdir():
            target = Path("configs") / "whitebox" / kind / folder.name
            if not (clone / target).exists():
                shutil.copytree(folder, clone / target)
                changes.append(f"{target}/")
    return changes


def _read(clone: Path, file: Path) -> list[str]:
    if not (clone / file).is_file():
        raise ValueError(
            f"{clone} has no {file}; name the folder of a clone of TamperBench, or follow its "
            "CONTRIBUTING.md where it has moved"
        )
    return (clone / file).read_text(encoding="utf-8").splitlines()
