"""Names of what is kept: a hash of the code and the values that decide it, and of nothing else.

The code of a stage is that of its module and of all that it imports from this package and from
torch_booster, without docstrings, comments and layout. Imports under `TYPE_CHECKING` serve
annotations only. `settings` is left out: what a stage takes from there are values, hashed as such.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OURS = ("benchmarks.harmful_finetuning", "torch_booster")
VALUES = {"benchmarks.harmful_finetuning.settings"}
LIBRARIES = ("torch", "transformers", "peft")


def digest(*parts: Any) -> str:
    """A short hash of values that json can write."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code(*modules: str) -> str:
    """A hash of the code of modules with all that they import, and of the libraries' versions."""
    found: dict[str, str] = {}
    left = list(modules)
    while left:
        name = left.pop()
        if name not in found and name not in VALUES:
            tree = _parsed(name)
            found[name] = _normalised(tree)
            left += _imported(tree)
    return digest(found, {name: version(name) for name in LIBRARIES})


def _parsed(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text("utf-8"))


def _normalised(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body: list[ast.stmt] = getattr(node, "body", [])
        if isinstance(body, list):  # of a lambda it is an expression
            kept = [line for line in body if not _is_text(line)]
            node.body = kept or [ast.Pass()] * bool(body)  # pyright: ignore[reportAttributeAccessIssue]
    return ast.unparse(tree)


def _is_text(line: ast.stmt) -> bool:
    """Whether a statement is a string alone: a docstring, or text below an attribute."""
    value = getattr(line, "value", None)
    return (
        isinstance(line, ast.Expr)
        and isinstance(value, ast.Constant)
        and isinstance(value.value, str)
    )


def _imported(tree: ast.Module) -> list[str]:
    """The modules of ours that a module imports, but for those of annotations."""
    found: list[str] = []
    for node in _outside_annotations(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = node.module.split(".")[0] in {name.split(".")[0] for name in OURS}
            modules = [name for name in inner if ours and _is_module(name)]
            found += modules if len(modules) == len(inner) else [node.module, *modules]
    return [name for name in found if name.startswith(OURS) and _is_module(name)]


def _outside_annotations(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += [node, *_outside_annotations(node)]
    return nodes


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, AttributeError):  # its parent is a module and no package
        return False
