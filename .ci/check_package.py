"""Builds wheel and sdist and checks what is in them.

python .ci/check_package.py [FOLDER]    # where they are kept; nowhere by default
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 1_000_000  # bytes of the sdist
NEEDED = (".ci/run", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt")
NEEDED += ("docs/index.md", "examples/minimal.py", "pyproject.toml", "tests/conftest.py")


def modules() -> set[str]:
    """What a wheel has to hold of the package."""
    package = ROOT / "torch_booster"
    files = [*package.rglob("*.py"), *package.rglob("py.typed")]
    return {file.relative_to(ROOT).as_posix() for file in files}


def wheel_faults(wheel: Path) -> list[str]:
    """What is missing in a wheel or too much, and what an index would show wrongly."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        description = message_from_bytes(archive.read(metadata)).get_payload()
    faults = [f"{wheel.name} lacks {name}" for name in sorted(modules() - names)]
    faults += [f"{wheel.name} holds {name}" for name in sorted(names - modules())]
    links = re.findall(r"\]\((?!https?:)[^)]*\)|<img[^>]*>", str(description))
    return faults + [f"{wheel.name}: its description links into the repository: {n}" for n in links]


def sdist_faults(sdist: Path) -> list[str]:
    """What is missing in an sdist, and whether it is too large."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    faults = [f"{sdist.name} lacks {name}" for name in NEEDED if name not in names]
    faults += [f"{sdist.name} lacks {name}" for name in sorted(modules() - names)]
    size = sdist.stat().st_size
    if size > LARGEST:
        faults.append(f"{sdist.name} has {size:,} bytes, more than {LARGEST:,}")
    return faults


def main(folder: Path) -> int:
    """Builds, checks and returns the exit status."""
    run = [sys.executable, "-m"]
    subprocess.run([*run, "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    subprocess.run([*run, "twine", "check", "--strict", wheel, sdist], check=True)
    faults = wheel_faults(wheel) + sdist_faults(sdist)
    for fault in faults:
        print(fault)
    sizes = ", ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in (wheel, sdist))
    print(f"{sizes}: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))
