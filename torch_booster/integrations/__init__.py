"""Booster in the loops of other libraries; each module needs the library it is named after."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["needs"]


@contextmanager
def needs(extra: str) -> Generator[None]:
    """Context of the imports that an extra of this package installs.

    Raises:
        ImportError: One of them fails; says how to install the extra.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"torch_booster.integrations.{extra} needs what its extra installs ({error}): "
            f"pip install 'torch_booster[{extra}]'"
        ) from error
