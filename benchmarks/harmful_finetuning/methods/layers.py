"""Access to what happens inside a decoder's layers, with or without a PEFT adapter around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def submodules(model: nn.Module, name: str) -> list[nn.Module]:
    """The submodule called `name` of each decoder layer, such as `self_attn` or `mlp`.

    Raises:
        ValueError: The model has none.
    """
    found = [module for path, module in model.named_modules() if path.split(".")[-1] == name]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no submodule called {name!r}, by which the layers of "
            "Llama, Gemma 2 and Qwen2 are found."
        )
    return found


@contextmanager
def forward_hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Has `hook(module, inputs, output)` on each module, and on none afterwards."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
