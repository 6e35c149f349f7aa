"""Runs the paper's experiments, and makes tables and figures of what came out.

A defense aligns a model, a user fine-tunes it on a task of which a fraction p of the samples are
harmful, and the harmful score, the finetune accuracy and the over-refusal are measured before,
during and after. What is finished is kept under --cache: the same command goes on where it was
stopped.

    python -m benchmarks.harmful_finetuning run harmful-ratio --trained full
    python -m benchmarks.harmful_finetuning run all --preset quick
    python -m benchmarks.harmful_finetuning report --base.model FOLDER --data.harmful.set FILE ...
    python -m benchmarks.harmful_finetuning tables harmful-ratio --trained full
    python -m benchmarks.harmful_finetuning publish
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks.harmful_finetuning import (
    landscape,
    page,
    reading,
    report,
    results,
    runs,
    system,
    tables,
)
from benchmarks.harmful_finetuning.experiments import (
    CANDIDATES,
    EXPERIMENTS,
    NEED_LANGUAGE,
    NEED_PRETRAINING,
    Experiment,
    Point,
    points,
    tuning_points,
)
from benchmarks.harmful_finetuning.intervals import break_step
from benchmarks.harmful_finetuning.methods import METHODS, RECOMMENDED
from benchmarks.harmful_finetuning.presets import PRESETS, preset
from benchmarks.harmful_finetuning.settings import Settings, changed, config_flags

Preset = Literal[tuple(PRESETS)]  # pyright: ignore[reportInvalidTypeForm]
Name = Literal[(*EXPERIMENTS, "all")]  # pyright: ignore[reportInvalidTypeForm]
Published = Literal[tuple(EXPERIMENTS)]  # pyright: ignore[reportInvalidTypeForm]
MethodName = Literal[tuple(METHODS)]  # pyright: ignore[reportInvalidTypeForm]
Tuned = Literal[tuple(CANDIDATES)]  # pyright: ignore[reportInvalidTypeForm]
WORKERS = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Common:
    """What every command that computes takes."""

    preset: Preset = "small"
    """sizes of a run"""
    config: str = ""
    """JSON file of settings, over the preset's"""
    workers: int = WORKERS
    """processes that share the work; 1 does everything in this process"""
    cache: Path = Path("~/.cache/torch_booster/benchmark")
    """where finished work is kept"""
    output: Path = Path("harmful_finetuning")
    """folder of tables to which the results are added"""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")

    @property
    def tuned(self) -> Settings:
        """The settings with the hyperparameters of the preset, unless a configuration is given."""
        known = {} if self.config else preset(self.preset, self.settings.trained).given
        return changed(self.settings, {"given": known | self.settings.given})


@dataclass(frozen=True)
class Run(Common):
    """Runs experiments."""

    experiments: tyro.conf.Positional[tuple[Name, ...]] = ()
    """which"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """each with a base model of its own"""
    methods: tuple[MethodName, ...] = ()
    """instead of the experiments' own"""
    ends_only: bool = False
    """the first and the last value of each axis alone (always so with --preset quick)"""
    dry_run: bool = False
    """show what would be run, and stop"""


@dataclass(frozen=True)
class Report(Common):
    """Aligns a model with SFT and with a defense, attacks both, and writes a report card."""

    output: Path = Path("report")
    """folder of report.json, report.md and report.svg"""
    p: tuple[float, ...] = (0.0, 0.1, 0.2)
    """fractions of the user's samples that are harmful"""
    seeds: tuple[int, ...] = (0,)
    """of batches, adapters and the user's samples"""
    methods: tuple[MethodName, ...] = ()
    """which; the verdict compares the first and the last (none: sft and what is recommended)"""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        for name in ("p", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, name at least one")
        if len(set(self.methods)) == 1:
            raise ValueError("a report compares methods: name at least two, such as sft booster")


@dataclass(frozen=True)
class Tune(Common):
    """Scores four settings of each method on validation prompts."""

    seeds: tuple[int, ...] = (100, 101)
    """that no published run uses"""
    methods: tuple[Tuned, ...] = tuple(CANDIDATES)
    """which"""


@dataclass(frozen=True)
class Landscape(Common):
    """Follows aligned models along one harmful step of growing length, before any attack."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """each with a base model of its own"""
    methods: tuple[MethodName, ...] = ("sft", "booster", "booster_warmed")
    """which"""


@dataclass(frozen=True)
class System(Common):
    """Measures what each method's alignment step costs, side by side in one process."""

    methods: tuple[MethodName, ...] = ("sft", "repnoise", "vaccine", "booster", "booster_vaccine")
    """which; the first is what the others are compared with"""


@dataclass(frozen=True)
class Search(Common):
    """Searches for the attack that serves an attacker best, for each aligned model."""

    methods: tuple[MethodName, ...] = (
        *("sft", "lisa", "repnoise", "vaccine", "booster", "booster_recommended"),
    )
    """which; the first is what the others are compared with"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """each with a base model of its own"""
    budget: int = 40
    """attacks that are tried on each model"""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        if self.budget < 1:
            raise ValueError(f"budget is {self.budget}, expected at least 1")


@dataclass(frozen=True)
class Sheet:
    """Writes answers to harmful prompts into a sheet, for a person to judge."""

    file: tyro.conf.Positional[Path]
    """csv file; fill its last column with 1 (complies) or 0, then `agreement`"""
    count: int = 100
    """how many, as many of each method before and after the attack"""
    cache: Path = Path("~/.cache/torch_booster/benchmark")
    """where finished work is kept"""


@dataclass(frozen=True)
class Agreement:
    """Says how often the reader of a sheet and the judge agree."""

    file: tyro.conf.Positional[Path]
    """the filled sheet"""
    output: Path = Path("agreement.json")
    """counts without any text"""
    cache: Path = Path("~/.cache/torch_booster/benchmark")
    """where finished work is kept"""


@dataclass(frozen=True)
class Show:
    """Prints all tables of one experiment."""

    experiment: tyro.conf.Positional[Published]
    """which"""
    trained: Literal["lora", "full"] = "full"
    """what both stages trained"""
    round: str = ""
    """one_base for the first round"""
    folder: Path = results.FOLDER
    """where the tables are"""


@dataclass(frozen=True)
class Publish:
    """Writes docs/results.md and its figures from the published tables."""

    folder: Path = results.FOLDER
    """where the tables are"""
    docs: Path = page.DOCS
    """where the page and its images go"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    console = Console()
    runs.quieten_libraries()
    try:
        return _do(_parsed(argv), argv, console)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished work is kept: the same command goes on from there.")
        return 130
    except (OSError, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2


COMMANDS: dict[str, type] = {
    "run": Run,
    "report": Report,
    "tune": Tune,
    "landscape": Landscape,
    "system": System,
    "attack-search": Search,
    "sheet": Sheet,
    "agreement": Agreement,
    "tables": Show,
    "publish": Publish,
}


def _parsed(argv: list[str]) -> Any:
    """Command line over config over the preset's choices over the paper's defaults."""
    chosen: dict[str, Any] = {}
    words = dict(itertools.pairwise(argv))  # enough to find the defaults of the rest
    if argv and issubclass(COMMANDS.get(argv[0], Show), Common):
        name, trained = words.get("--preset", "small"), words.get("--trained", "lora")
        extra = config_flags(Path(words["--config"])) if "--config" in words else []
        if "--trained" in extra:
            trained = words.get("--trained", extra[extra.index("--trained") + 1])
        # What was tuned comes in later: a table that is not empty would fix its keys.
        settings = changed(preset(name if name in PRESETS else "small", trained), {"given": {}})
        other = {"--data.root", "--data.beavertails", "--data.harmful.set", "--base.model"}
        paper = words.get("--data.real", settings.data.real) == "paper"
        answered = "--data.kind.set" in words if "--data.harmful.set" in words else paper
        if other & {*words} and not answered:
            settings = changed(settings, {"data.kind_samples": 0})  # which have no answers there
        chosen = {"settings": settings}
        own = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
        argv = [*argv[:own], *extra, *argv[own:]]
    kinds = [
        Annotated[
            kind,
            tyro.conf.subcommand(
                name,
                **({"default": kind(**chosen)} if issubclass(kind, Common) else {}),
            ),
        ]
        for name, kind in COMMANDS.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return tyro.cli(
        union,
        args=argv,
        prog="python -m benchmarks.harmful_finetuning",
        description=__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _do(command: Any, argv: list[str], console: Console) -> int:
    if isinstance(command, Show):
        found = results.load(command.folder)
        console.out(tables.details(found, command.experiment, command.trained, command.round))
        return 0
    if isinstance(command, Publish):
        for file in page.write(results.load(command.folder), command.docs):
            console.print(str(file), soft_wrap=True)
        return 0
    if isinstance(command, Sheet):
        answers = reading.kept(command.cache.expanduser())
        n = reading.write_sheet(answers, command.count, command.file)
        console.print(f"{n} answers: {command.file}", soft_wrap=True)
        return 0
    if isinstance(command, Agreement):
        counted = reading.agreement(reading.kept(command.cache.expanduser()), command.file)
        command.output.write_text(json.dumps(counted, indent=1) + "\n", "utf-8")
        console.print(reading.said(counted), soft_wrap=True)
        return 0
    if isinstance(command, Run):
        return _run(command, argv, console)
    if isinstance(command, Report):
        return _report(command, console)
    return _measure(command, argv, console)


def _run(command: Run, argv: list[str], console: Console) -> int:
    chosen = _chosen(command)
    ends = command.ends_only or command.preset == "quick"
    planned: dict[str, list[Point]] = {}
    seen: set[str] = set()
    for name, experiment in chosen.items():
        own = command.methods or experiment.methods
        if ends:  # each method once, and in every experiment the two that all is about
            own = [m for m in own if m in ("sft", "booster") or m not in seen]
        seen |= {*own}
        planned[name] = list(points(experiment, command.tuned, command.seeds, own, ends))
    for name, wanted in planned.items():
        methods = ", ".join(dict.fromkeys(point.run.method for point in wanted))
        model = command.settings.base.model or f"a small {command.settings.base.architecture}"
        console.print(f"{name}: {len(wanted)} runs of {model}: {methods}", soft_wrap=True)
    if command.dry_run:
        return 0
    records = iter(
        _with_progress(
            command,
            console,
            lambda cache, progress: runs.finish(
                [point.run for wanted in planned.values() for point in wanted],
                cache,
                command.workers,
                progress,
            ),
        )
    )
    found = results.load(command.output)
    for name, wanted in planned.items():
        pairs = results.points_of(wanted, [next(records) for _ in wanted])
        trained = command.settings.trained
        found = results.added(found, name, trained, _reproducing(argv, name), pairs)
    results.save(found, command.output)
    for name in planned:
        if len(planned) == 1:
            console.out(tables.details(found, name, command.settings.trained))
    console.print(f"results: {command.output}", soft_wrap=True)
    return 0


def _report(command: Report, console: Console) -> int:
    wanted = [
        runs.run_of(method, seed, changed(command.tuned, {"attack.p": p}))
        for method in command.methods or ("sft", RECOMMENDED[command.settings.trained])
        for seed in command.seeds
        for p in command.p
    ]
    records = _with_progress(
        command,
        console,
        lambda cache, progress: runs.finish(wanted, cache, command.workers, progress),
    )
    card = report.card_of(records)
    console.out(report.text(card))
    for file in report.write(card, command.output):
        console.print(str(file), soft_wrap=True)
    return 0


def _chosen(command: Run) -> dict[str, Experiment]:
    """The experiments that were asked for and that fit the settings.

    Raises:
        ValueError: None was asked for, or none fits.
    """
    settings = command.settings
    fixed = NEED_PRETRAINING if settings.base.model else set[str]()  # it has the size that it has
    fixed = fixed if settings.templated else fixed | NEED_LANGUAGE
    asked = EXPERIMENTS if "all" in command.experiments else dict.fromkeys(command.experiments)
    if not asked:
        raise ValueError(f"name an experiment: {', '.join(EXPERIMENTS)} or all")
    chosen = {name: EXPERIMENTS[name] for name in asked if name not in fixed}
    if not chosen:
        name = next(iter(asked))
        needed = "a pretrained base" if name in NEED_PRETRAINING else "the templates"
        raise ValueError(
            f"{name} varies {needed}; run it without --base.model, --data.root, "
            "--data.beavertails, --data.harmful.set or a config that sets them"
        )
    return chosen


def _measure(command: Any, argv: list[str], console: Console) -> int:
    """Tunes, or measures what attacks no model."""
    settings: Settings = command.tuned
    found = results.load(command.output)
    if isinstance(command, Tune):
        wanted = list(tuning_points(settings, command.seeds, command.methods))
        records = _with_progress(
            command,
            console,
            lambda cache, progress: runs.finish(
                [point.run for point in wanted], cache, command.workers, progress
            ),
        )
        rows = [_tuned(settings, *pair) for pair in zip(wanted, records, strict=True)]
        found = results.merged(found, "tuning", rows)
        console.out(tables.tuning(found, settings.trained))
    elif isinstance(command, Search):
        from benchmarks.harmful_finetuning import search  # optuna, which no other command needs

        settings = changed(settings, {"attack.p": 0.2})
        wanted = [runs.run_of(m, seed, settings) for seed in command.seeds for m in command.methods]
        tried = _with_progress(
            command,
            console,
            lambda cache, progress: search.finish(
                wanted, command.budget, cache, command.workers, progress
            ),
        )
        found = results.merged(found, "searches", tried)
        console.out(tables.searches(found, settings.trained))
        found = _with_command(found, argv, settings)
    else:
        seeds = command.seeds if isinstance(command, Landscape) else (0,)
        wanted = [runs.run_of(name, seed, settings) for seed in seeds for name in command.methods]
        measure: Any = landscape.measure if isinstance(command, Landscape) else system.measure
        rows = _with_progress(
            command,
            console,
            lambda cache, progress: measure(wanted, cache, runs.shown_on(progress)),
        )
        if isinstance(command, Landscape):
            found = results.merged(results.merged(found, "lines", rows[0]), "gradients", rows[1])
            console.out(tables.lines(found, settings.trained, "harmful_loss", "gradient"))
        else:
            found = results.merged(found, "costs", rows)
            console.out(tables.costs(found, settings.trained))
        found = _with_command(found, argv, settings)
    results.save(found, command.output)
    console.print(f"results: {command.output}", soft_wrap=True)
    return 0


def _with_command(found: results.Tables, argv: list[str], settings: Settings) -> results.Tables:
    where = {"round": "", "experiment": argv[0], "trained": settings.trained}
    line = where | {"command": _reproducing(argv, argv[0])}
    return results.merged(found, "commands", [line])


def _tuned(settings: Settings, point: Point, record: runs.Record) -> dict[str, Any]:
    return {
        "round": "",
        "trained": settings.trained,
        "kind_samples": settings.data.kind_samples,
        "method": point.run.method,
        "setting": json.dumps(point.value),
        "seed": point.run.seed,
        **{name: value for name, value in record["attacked"].items() if name in results.SCORES},
        "aligned_harmful_loss": record["aligned"]["harmful_loss"],
        "aligned_harmful_score": record["aligned"]["harmful_score"],
        "break": break_step([(p["step"], p["harmful_score"]) for p in record["curve"]]),
    }


def _with_progress(command: Common, console: Console, work: Callable[[Path, Progress], Any]) -> Any:
    cache = command.cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(runs.threads_of_each(command.workers))
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        return work(cache, progress)


def _reproducing(argv: list[str], name: str) -> str:
    """The command line of one experiment; of folders of this machine it has the names."""
    argv = [part for word in argv for part in word.split("=", 1 if word.startswith("--") else 0)]
    places = {i for i, word in enumerate(argv) if word in ("--cache", "--output", "--workers")}
    kept = [
        Path(word).name if Path(word).is_absolute() else word
        for i, word in enumerate(argv)
        if i not in places and i - 1 not in places
    ]
    rest = [word for word in kept[1:] if word not in (*EXPERIMENTS, "all")]
    own = [name] if argv[0] == "run" else []
    return shlex.join(["python", "-m", "benchmarks.harmful_finetuning", argv[0], *own, *rest])


if __name__ == "__main__":
    sys.exit(main())
