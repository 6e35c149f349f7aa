"""Takes aligned models to TamperBench.

`export` writes an aligned model, whole or an adapter, as a merged Hugging Face checkpoint with a
card, which TamperBench's scripts attack as any other. `plug` names torch_booster's defense and the
paper's attack in a clone of TamperBench.

    python -m benchmarks.tamperbench export ALIGNED --base BASE --output exported/booster
    python -m benchmarks.tamperbench plug TamperBench

docs/tamperbench.md goes from one to the other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from benchmarks.harmful_finetuning.runs import quieten_libraries
from benchmarks.tamperbench import card
from benchmarks.tamperbench.card import Alignment
from benchmarks.tamperbench.export import export
from benchmarks.tamperbench.plug import plug


@dataclass(frozen=True)
class Export:
    """Writes an aligned model as a merged checkpoint with a card.

    The benchmark's records are found beside its aligned folders and say how a model was aligned.
    For other models the card says what the flags say.
    """

    model: tyro.conf.Positional[Path]
    """folder of a whole model, or of a PEFT adapter"""
    output: Path
    """a new folder"""
    base: str = ""
    """base model, folder or hub name (empty: the adapter's own, or the record's)"""
    record: Path | None = None
    """run-*.json of the benchmark, or results.json of the example (none: those beside the model)"""
    method: str = ""
    """name of the method, where there is no record"""
    hyperparameters: dict[str, str] = field(default_factory=dict[str, str])
    """its own and the training's, as lam 5 alpha 0.1 lr 5e-4, where there is no record"""
    data: str = ""
    """names of what it was aligned with, where there is no record"""
    template: str = ""
    r"""text around each {prompt}, with \n for a new line, or chat, where there is no record"""
    dtype: Literal["", "auto", "float32", "bfloat16", "float16"] = ""
    """to merge in (empty: the record's; auto: as the weights are stored)"""


@dataclass(frozen=True)
class Plug:
    """Names the defense and the attack in a clone of TamperBench."""

    clone: tyro.conf.Positional[Path]
    """its folder"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    command = tyro.cli(
        Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Plug, tyro.conf.subcommand("plug")],  # pyright: ignore[reportArgumentType]
        args=argv,
        prog="python -m benchmarks.tamperbench",
        description=__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    console = Console()
    quieten_libraries()
    try:
        if isinstance(command, Plug):
            for change in plug(command.clone) or ["nothing was missing"]:
                console.print(escape(change), highlight=False, soft_wrap=True)
            return 0
        alignment = alignment_of(command)
        if not alignment.method:
            console.print(
                f"no record of {command.model} was found and nothing was told of it: its card will "
                "not say how it was aligned (--method, --hyperparameters, --data, --template)",
                highlight=False,
                soft_wrap=True,
            )
        with console.status("merging, writing and reading again"):
            difference = export(command.model, command.output, alignment)
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing was left behind.")
        return 130
    except (OSError, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    console.print(
        f"{command.output}: logits differ by {difference:.1g} of their norm; README.md is its card",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def alignment_of(command: Export) -> Alignment:
    """How the model was aligned: what its records say, else what the flags say.

    Raises:
        ValueError: A flag and a record say the same thing.
    """
    own = {
        "method": command.method,
        "hyperparameters": command.hyperparameters,
        "data": command.data,
        "template": command.template.replace("\\n", "\n"),
    }
    given = {name: value for name, value in own.items() if value}
    known = card.recorded(command.model, command.record)
    if known is not None and given:
        raise ValueError(
            f"the record of {command.model} says how it was aligned; leave --{next(iter(given))} "
            "out"
        )
    known = known or Alignment(**given)
    return replace(known, base=command.base or known.base, dtype=command.dtype or known.dtype)


if __name__ == "__main__":
    sys.exit(main())
