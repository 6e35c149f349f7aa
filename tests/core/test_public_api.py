"""What a user sees of the package: names, imports, typing, the README's code."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch_booster
from torch_booster import BoosterOptimizer

ROOT = Path(__file__).parents[2]


def test_every_public_name_resolves() -> None:
    assert torch_booster.__all__ == ["BoosterOptimizer", "Diagnostics", "__version__"]
    for name in torch_booster.__all__:
        assert getattr(torch_booster, name) is not None
    assert torch_booster.__version__ == version("torch_booster")
    assert files("torch_booster").joinpath("py.typed").is_file()


def test_signature() -> None:
    parameters = inspect.signature(BoosterOptimizer).parameters
    assert list(parameters)[:3] == ["base_optimizer", "lam", "alpha"]
    assert (parameters["lam"].default, parameters["alpha"].default) == (5.0, 0.1)
    for name in list(parameters)[3:]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_core_imports_torch_alone() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import torch_booster
new = {name.split(".")[0] for name in set(sys.modules) - before}
new -= set(sys.stdlib_module_names) | {"torch", "torch_booster"}
assert not new, new
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_readme_shows_the_minimal_example() -> None:
    example = (ROOT / "examples" / "minimal.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example in blocks


def test_imports_point_one_way() -> None:
    """optimizer -> hyperparameters -> closure -> distributed -> functional -> torch."""
    order = ["functional", "checks", "diagnostics", "distributed", "closure", "signals"]
    order += ["hyperparameters"]
    order += ["optimizer"]
    for index, name in enumerate(order):
        source = files("torch_booster").joinpath(f"{name}.py").read_text()
        imported = re.findall(r"from torch_booster\.(\w+) import", source)
        assert set(imported) <= set(order[:index]), name
