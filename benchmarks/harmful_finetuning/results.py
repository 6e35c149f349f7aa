"""Published results: a folder of tables that a diff can show, each fact in one place.

=================  ===========================================================================
experiments.csv    which runs each experiment is made of, at which value of its axis
commands.csv       the command that makes each experiment
runs.csv           a run: method, seed, hyperparameters, scores before and after the attack, times
settings.jsonl     the settings of runs, nested as a configuration file is
curves.csv         scores during the attack
traces.csv         what an alignment saw, by the aligned model that it made
answers.csv        answers to the first test prompts, with the judge's verdict
lines.csv          an aligned model along straight lines (`landscape`)
gradients.csv      where its harmful gradient lies
costs.csv          what a step costs (`system`)
searches.csv       an attack that was tried on an aligned model (`attack-search`)
tuning.csv         scores of each candidate on validation prompts (`tune`)
=================  ===========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harmful_finetuning.experiments import Point
from benchmarks.harmful_finetuning.keys import digest
from benchmarks.harmful_finetuning.runs import Record

FOLDER = Path(__file__).parents[1] / "results" / "harmful_finetuning"
"""Where the published results are."""

SCORES = {  # score: (its name, decimals)
    "harmful_score": ("Harmful score ↓, %", 1),
    "finetune_accuracy": ("Finetune accuracy ↑, %", 1),
    "over_refusal": ("Over-refusal ↓, %", 1),
    "harmful_loss": ("Harmful loss, nats", 2),
    "perplexity": ("Perplexity of people's answers ↓", 1),
}
EXPERIMENT = ["round", "experiment", "trained"]
KEYS: dict[str, list[str]] = {  # of each table: what tells its rows apart
    "experiments": [*EXPERIMENT, "value", "run"],
    "commands": EXPERIMENT,
    "runs": ["run"],
    "settings": ["settings"],
    "curves": ["run", "step"],
    "traces": ["trace", "step"],
    "answers": ["answer"],
    "lines": ["trained", "method", "seed", "direction", "distance"],
    "gradients": ["trained", "method", "seed"],
    "costs": ["trained", "method"],
    "searches": ["trained", "method", "seed", "trial"],
    "tuning": ["round", "trained", "kind_samples", "method", "setting", "seed"],
}
WORDS: dict[str, Any] = dict.fromkeys(
    (
        *("round", "experiment", "trained", "value", "command", "method", "hyperparameters"),
        *("run", "trace", "answer", "answers", "answers_before", "settings", "setting", "commit"),
        *("prompt", "text", "direction", "curve"),
        *("attack_optimizer", "attack_trained", "attack_harmful", "attack_others"),
    ),
    str,
)

Tables = dict[str, pd.DataFrame]


def load(folder: Path = FOLDER) -> Tables:
    """All tables in a folder; one that is not there is empty.

    Raises:
        ValueError: A table can not be read.
    """
    tables: Tables = {}
    for name, columns in KEYS.items():
        file = _file(folder, name)
        tables[name] = pd.DataFrame(columns=columns)
        if file.exists():
            try:
                tables[name] = _read(file)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{file} can not be read, mend or remove it: {error}") from error
    return tables


def _file(folder: Path, name: str) -> Path:
    return folder / (f"{name}.jsonl" if name == "settings" else f"{name}.csv")


def _read(file: Path) -> pd.DataFrame:
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        return pd.DataFrame({"settings": [r.pop("settings") for r in rows], "values": rows})
    # An empty cell alone is missing, and in a column of words it is the empty word.
    table = pd.read_csv(file, dtype=WORDS, keep_default_na=False, na_values=[""])
    words = [name for name in WORDS if name in table]
    table[words] = table[words].fillna("")
    missing = [name for name in KEYS[file.stem] if name not in table]
    if missing:
        raise KeyError(f"there is no column {', '.join(missing)}")
    return table


def save(tables: Tables, folder: Path) -> None:
    """Writes all tables that hold something, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        if table.empty:
            continue
        file = _file(folder, name)
        unfinished = file.with_suffix(".unfinished")
        if name == "settings":
            pairs = zip(table["settings"], table["values"], strict=True)
            lines = [json.dumps({"settings": key} | values) for key, values in pairs]
            unfinished.write_text("\n".join(sorted(lines)) + "\n", "utf-8")
        else:
            table.to_csv(unfinished, index=False, float_format="%.7g", encoding="utf-8")
        unfinished.replace(file)


def merged(tables: Tables, name: str, rows: Iterable[dict[str, Any]]) -> Tables:
    """The tables with rows added to one of them, in the place of those with the same key."""
    new = pd.DataFrame(list(rows))
    if new.empty:
        return tables
    both = new if tables[name].empty else pd.concat([tables[name], new], ignore_index=True)
    return tables | {name: both.drop_duplicates(KEYS[name], keep="last", ignore_index=True)}


def added(
    tables: Tables,
    name: str,
    trained: str,
    command: str,
    points: Iterable[tuple[Any, Record]],
    round_: str = "",
) -> Tables:
    """The tables with one experiment's results in the place of those that it had.

    Args:
        tables: What there is.
        name: Of the experiment.
        trained: lora, or full for all weights.
        command: What makes it again.
        points: Values of the axis, each with the record of a run.
        round_: Of experiments; the present one has no name.
    """
    old = tables["experiments"]
    if not old.empty:
        same = (old["round"] == round_) & (old["experiment"] == name) & (old["trained"] == trained)
        tables = tables | {"experiments": old[~same].reset_index(drop=True)}
    where = {"round": round_, "experiment": name, "trained": trained}
    rows: dict[str, list[dict[str, Any]]] = {key: [] for key in KEYS}
    rows["commands"].append(where | {"command": command})
    for value, record in points:
        place = where | {"value": json.dumps(value)}
        for table, more in _rows(record).items():
            rows[table] += more
        rows["experiments"].append(place | {"run": rows["runs"][-1]["run"]})
    for table, more in rows.items():
        tables = merged(tables, table, more)
    return tables


def _rows(record: Record) -> dict[str, list[dict[str, Any]]]:
    """What a record adds to each table."""
    scores = {
        f"{when}_{score}": value
        for when, stage in (("before", "aligned"), ("after", "attacked"))
        for score, value in record[stage].items()
    }
    if not record.get("templated", True):  # what models say to real requests is not published
        record = record | {"aligned_answers": [], "answers": []}
    answers = {digest(a)[:6]: a for k in ("aligned_answers", "answers") for a in record[k]}
    names = {json.dumps(a): name for name, a in answers.items()}

    def named(stage: str) -> str:
        return " ".join(names[json.dumps(answer)] for answer in record[stage])

    settings = _portable(record["settings"])
    made_by = [record[k] for k in ("method", "seed", "hyperparameters")]
    times = (record["align_seconds_per_step"], record["attack_seconds_per_step"])
    run = digest(made_by, settings, record["curve"], scores, times)[:10]
    trace = digest(record["alignment"])[:8]
    kept = digest(settings)[:6]
    row = {
        "run": run,
        "method": record["method"],
        "seed": record["seed"],
        "hyperparameters": json.dumps(record["hyperparameters"]),
        "settings": kept,
        **scores,
        "align_passes_per_step": record.get("align_passes_per_step"),
        "align_seconds_per_step": record["align_seconds_per_step"],
        "attack_seconds_per_step": record["attack_seconds_per_step"],
        "trace": trace,
        "answers_before": named("aligned_answers"),
        "answers": named("answers"),
        "commit": record["commit"],
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    return {
        "runs": [row],
        "settings": [{"settings": kept, "values": settings}],
        "curves": [{"run": run} | point for point in record["curve"]],
        "traces": [{"trace": trace} | point for point in record["alignment"]],
        "answers": [
            {"answer": name, "complies": a["complies"], "prompt": a["prompt"], "text": a["answer"]}
            for name, a in answers.items()
        ],
    }


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what is of this machine alone: folders keep their names."""
    kept = {k: v for k, v in settings.items() if k not in ("device", "given")}
    base, own, score = kept["base"], kept["data"], kept["score"]
    places = {k: Path(own[k]).name for k in ("root", "beavertails") if own.get(k)}
    sets = {k: v | {"set": _name(v["set"])} for k, v in own.items() if isinstance(v, dict)}
    return kept | {
        "base": base | {"model": _name(base["model"])},
        "data": own | places | sets,
        "score": score | {"judge": _name(score["judge"])},
    }


def _name(source: str) -> str:
    """The last part of a place on this machine; a name of the hub as it is."""
    return Path(source).name if Path(source).is_absolute() else source


def points_of(points: Iterable[Point], records: Iterable[Record]) -> list[tuple[Any, Record]]:
    """Values of the axis, each with its record."""
    return [(point.value, record) for point, record in zip(points, records, strict=True)]


def frame(tables: Tables, name: str, trained: str, round_: str = "") -> pd.DataFrame:
    """One experiment, a row a run, with the value of the axis and all scores.

    Raises:
        ValueError: There are no results of it, or two runs are in one place.
    """
    rows = tables["experiments"]
    if not rows.empty:
        rows = rows[(rows["round"] == round_) & (rows["experiment"] == name)]
        rows = rows[rows["trained"] == trained]
    if rows.empty:
        raise ValueError(f"there are no results of {name}, {trained}; run it first")
    found = rows.merge(tables["runs"], on="run", validate="many_to_one")
    found["value"] = found["value"].map(json.loads)
    twice = found[found.duplicated(["method", "seed", "value"])]
    if not twice.empty:
        place = ", ".join(f"{k} {twice.iloc[0][k]}" for k in ("method", "seed", "value"))
        raise ValueError(f"two runs of {name} have {place}; remove one from experiments.csv")
    return found
