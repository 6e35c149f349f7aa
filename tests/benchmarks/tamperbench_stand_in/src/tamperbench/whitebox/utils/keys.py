"""Configurations as YAML gives them: all that has no default, and nothing that is no field."""

from dataclasses import MISSING, fields


def checked(kind, values):
    """The values, if they are those of the dataclass."""
    known = {f.name: f for f in fields(kind) if f.init}
    needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if needed - values.keys() or values.keys() - known.keys():
        raise ValueError(
            f"missing {needed - values.keys()}, unknown {values.keys() - known.keys()}"
        )
    return values
