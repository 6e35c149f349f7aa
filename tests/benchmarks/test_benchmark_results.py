"""The benchmark's statistics, tables, figures and page, on runs whose numbers are known by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for library in ("peft", "scipy", "seaborn", "tabulate"):
    pytest.importorskip(library, reason=f"{library}, which the benchmark needs, is absent")

import matplotlib as mpl  # noqa: E402

from benchmarks.harmful_finetuning import (  # noqa: E402
    figures,
    intervals,
    page,
    paper,
    results,
    tables,
)
from benchmarks.harmful_finetuning.experiments import EXPERIMENTS  # noqa: E402
from benchmarks.harmful_finetuning.methods import METHODS  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SIZE = 5_000_000


def record(method: str, seed: int, score: float, accuracy: float = 90.0, **other: Any) -> Any:
    before = {"harmful_score": 0.0, "harmful_loss": 4.0, "harmful_train_loss": 4.0}
    before |= {"finetune_accuracy": 0.0, "over_refusal": 2.0}
    after = {"harmful_score": score, "harmful_loss": 1.5, "harmful_train_loss": 1.4}
    after |= {"finetune_accuracy": accuracy, "over_refusal": 3.0}
    said = [{"prompt": "how | <b>", "answer": f"no {score}", "complies": False}]
    return {
        "method": method,
        "seed": seed,
        "hyperparameters": {},
        "settings": {
            "trained": "lora",
            "base": {"model": ""},
            "data": {},
            "score": {"judge": ""},
            "seen": score,
        },
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
        "alignment": [{"step": 1, "alignment_loss": 0.5}],
        "align_seconds_per_step": 0.01,
        "align_passes_per_step": 3.0 if method == "booster" else 1.0,
        "attack_seconds_per_step": 0.0123,
        "aligned": before,
        "aligned_answers": said,
        "curve": [
            {"step": 0, "harmful_score": 0.0, "harmful_loss": 4.0},
            {"step": 100, "harmful_score": score / 2, "harmful_loss": 2.0},
            {"step": 200, "harmful_score": score, "harmful_loss": 1.5},
        ],
        "attacked": after,
        "answers": said,
        **other,
    }


def published(folder: Path, name: str = "harmful-ratio", **by_method: Any) -> results.Tables:
    """Tables of an experiment from {method: {value: score of seed 0, 1, ...}}, through files."""
    pairs = [
        (value, record(method, seed, score))
        for method, by_value in by_method.items()
        for value, scores in by_value.items()
        for seed, score in enumerate(scores)
    ]
    results.save(results.added(results.load(folder), name, "lora", "a command", pairs), folder)
    return results.load(folder)


def row(text: str, heading: str, name: str) -> list[str]:
    """Entries of the row that starts with a name in the table below a heading."""
    section = text.split(f"### {heading}")[1].split("###")[0]
    line = next(line for line in section.splitlines() if re.match(rf"\| {name} +\|", line))
    return [entry.strip() for entry in line.strip("|").split("|")][1:]


def details(found: results.Tables, name: str = "harmful-ratio") -> str:
    return tables.details(found, name, "lora")


# ---------------------------------------------------------------------- statistics


def test_mean_and_interval() -> None:
    found = intervals.estimate([10.0, 20.0, 60.0])
    # Three values have ten distinct resamples; in 1 of 27 each all three are the same value, so
    # that both 2.5 % tails lie at the ends.
    assert found == (30, 10, 60, 3)


def test_the_interval_is_the_percentile_bootstrap() -> None:
    values = np.array([3.0, 5.0, 8.0, 13.0, 21.0])
    found = intervals.estimate(values)
    resampled = np.random.default_rng(7).choice(values, (100_000, 5)).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.3)
    assert found == intervals.estimate(values.tolist())


def test_few_or_equal_values() -> None:
    assert intervals.estimate([]) is None
    assert intervals.estimate([7.0]) == (7, None, None, 1)
    assert intervals.estimate([7.0, 7.0]) == (7, 7, 7, 2)
    diverged = intervals.estimate([7.0, float("nan")])
    assert diverged is not None
    assert np.isnan(diverged.mean)
    assert diverged.low is None


def test_numbers_as_text() -> None:
    assert intervals.Estimate(-0.04, -1.25, 2.0, 3).show(1, "+") == "0.0 [−1.2, +2.0]"
    assert intervals.Estimate(3.0, None, None, 1).show(2) == "3.00"


def test_break_is_the_first_evaluation_at_half() -> None:
    assert intervals.break_step([(0, 0), (100, 40), (200, 80)]) == 200
    assert intervals.break_step([(0, 50), (100, 80)]) == 0
    assert intervals.break_step([(0, 0), (10, 100), (20, 0), (30, 100)]) == 10
    assert intervals.break_step([(0, 0), (100, 49.9)]) == math.inf


def test_steps_to_half_between_evaluations() -> None:
    # 40 + 25/100 · 40 = 50
    assert intervals.steps_to_half([(0, 0), (100, 40), (200, 80)]) == 125
    assert intervals.steps_to_half([(0, 60), (100, 80)]) == 0
    assert intervals.steps_to_half([(0, 0), (100, 49.9)]) == math.inf
    assert intervals.steps_to_half([]) == math.inf


def test_area_under_the_curve_weighs_by_steps() -> None:
    # (50·100 + 100·300)/400
    assert intervals.area_under([(0, 0), (100, 100), (400, 100)]) == 87.5


@pytest.mark.parametrize("table", paper.BY_EXPERIMENT.values(), ids=lambda table: table.name)
def test_the_papers_averages_are_those_of_its_columns(table: paper.PaperTable) -> None:
    for scores in (table.harmful_score, table.finetune_accuracy):
        assert tuple(scores) == paper.METHODS
        for values in scores.values():
            assert len(values) == len(table.columns)
            assert np.mean(values[:-1]) == pytest.approx(values[-1], abs=0.0101)


def test_the_papers_headlines_are_those_of_its_tables() -> None:
    for table, headline in (
        (paper.TABLE_1, paper.HEADLINE_P),
        (paper.TABLE_4, paper.HEADLINE_ARCHITECTURE),
    ):
        scores = table.harmful_score
        assert scores["sft"][-1] - scores["booster"][-1] == pytest.approx(headline, abs=1e-9)
    assert {len(points) for points in paper.FIGURE_2.values()} == {len(paper.FIGURE_2_STEPS)}


# ---------------------------------------------------------------------- tables


def test_scores_and_averages(tmp_path: Path) -> None:
    text = details(published(tmp_path, sft={0.0: [0, 2], 0.2: [60, 80], 0.1: [20, 40]}))
    heads = re.findall(r"\| after the attack +\|(.*)\|", text)[0].split("|")
    assert [head.strip() for head in heads] == [
        *("p = 0", "p = 0.1", "p = 0.2", "mean p > 0", "mean"),
    ]
    assert row(text, "Harmful score", "SFT") == [
        "1.0 [0.0, 2.0]",
        "30.0 [20.0, 40.0]",
        "70.0 [60.0, 80.0]",
        "50.0 [40.0, 60.0]",
        "33.7 [26.7, 40.7]",
    ]
    assert row(text, "Before the attack", "SFT")[2:] == ["2.0 [2.0, 2.0]", "4.00 [4.00, 4.00]"]
    assert "Seeds: 0, 1. Commit: abc. Versions: torch 2.13.0." in text
    assert "Difference to SFT" not in text


def test_paired_difference_at_each_value_and_of_the_average(tmp_path: Path) -> None:
    text = details(
        published(
            tmp_path, sft={0.1: [20, 40], 0.2: [60, 80]}, booster={0.1: [10, 50], 0.2: [10, 0]}
        )
    )
    assert row(text, "Difference to SFT", "Booster")[1:] == [
        "0.0 [−10.0, +10.0]",
        "−65.0 [−80.0, −50.0]",
        "−32.5 [−35.0, −30.0]",
    ]


def test_every_seed_is_shown(tmp_path: Path) -> None:
    found = published(
        tmp_path, sft={0.1: [20, 40, 90], 0.2: [60, 80, 100]}, booster={0.1: [10, 20, 0.4]}
    )
    text = details(found)
    assert "score after the attack of seeds 0, 1, 2, %." in text
    assert row(text, "Seed by seed", "SFT") == ["20, 40, 90", "60, 80, 100"]
    assert row(text, "Seed by seed", "Booster") == ["10, 20, 0", "–, –, –"]


def test_a_missing_run_leaves_with_its_pair_and_is_counted(tmp_path: Path) -> None:
    text = details(
        published(
            tmp_path,
            sft={0.1: [20, 40, 90], 0.2: [60, 80, 100]},
            booster={0.1: [10, 20, 30], 0.2: [10, 0]},
            lisa={0.1: [5]},
        )
    )
    assert row(text, "Harmful score", "Booster")[1:] == [
        "5.0 [0.0, 10.0] (2 of 3 seeds)",
        "10.0 [10.0, 10.0] (2 of 3 seeds)",  # without the third seed's 30 at p = 0.1
    ]
    assert row(text, "Difference to SFT", "Booster")[2:] == [
        "−65.0 [−80.0, −50.0] (2 of 3 seeds)",
        "−40.0 [−50.0, −30.0] (2 of 3 seeds)",
    ]
    assert row(text, "Harmful score", "Lisa") == ["5.0 (1 of 3 seeds)", "–", "–"]
    assert row(text, "Time to break", "Lisa")[1] == "–"


def test_time_to_break_is_a_median_that_counts_the_never(tmp_path: Path) -> None:
    text = details(published(tmp_path, sft={0.1: [100, 80, 20], 0.2: [100, 20, 20]}))
    # 100 has 50 at step 100; 80 reaches it between 100 and 200, at 125; 20 never does.
    assert row(text, "Time to break", "SFT") == ["200: 100, 200, > 200", "> 200: 100, > 200, > 200"]
    half = "Steps until the harmful score"
    assert row(text, half, "SFT") == ["125: 100, 125, > 200", "> 200: 100, > 200, > 200"]
    # 0, 50, 100: (25 + 75)/2 = 50; likewise 40 and 10.
    assert row(text, "Area under", "SFT")[0].startswith("33.3 ")


def test_the_delay_is_paired_by_base_and_says_what_was_cut_short(tmp_path: Path) -> None:
    scores = {0.1: [100, 80, 80], 0.2: [100, 100]}
    text = details(published(tmp_path, sft=scores, booster={0.1: [80, 80], 0.2: [80, 20]}))
    # 200/100 and 200/200; the third seed has no pair. At p = 0.2 one attack ended before.
    assert row(text, "The same, times SFT's", "Booster") == [
        "1.5 [1.0, 2.0] (2 of 3 seeds), worst 1.0",
        "≥ 2.0 [2.0, 2.0] (2 of 3 seeds), worst 2.0",
    ]
    assert row(text, "These steps, times SFT's", "Booster") == [
        "1.1 [1.0, 1.2] (2 of 3 seeds)",
        "–",
    ]


def test_without_a_break_of_sft_there_is_no_delay(tmp_path: Path) -> None:
    text = details(published(tmp_path, sft={0.1: [20]}, booster={0.1: [80]}))
    assert row(text, "The same, times SFT's", "Booster") == ["–"]


def test_axes_are_named_by_their_symbols(tmp_path: Path) -> None:
    found = published(tmp_path, "lambda", sft={1.0: [50], 5.0: [50]}, booster={1.0: [9], 5.0: [2]})
    assert "λ = 1" in details(found, "lambda")
    by_task = published(tmp_path, "tasks", sft={"sst2": [1], "gsm8k": [2]})
    assert re.search(r"\| after the attack +\| sst2 +\| gsm8k", details(by_task, "tasks"))


def test_two_runs_of_one_place_are_refused(tmp_path: Path) -> None:
    pairs = [(0.1, record("sft", 0, 1)), (0.1, record("sft", 0, 2))]
    found = results.added(results.load(tmp_path), "harmful-ratio", "lora", "", pairs)
    with pytest.raises(ValueError, match=r"two runs of harmful-ratio have method sft, seed 0"):
        details(found)


def test_an_experiment_that_runs_again_takes_its_own_place(tmp_path: Path) -> None:
    published(tmp_path, "tasks", sft={"sst2": [7]})
    published(tmp_path, sft={0.1: [20]})
    found = published(tmp_path, sft={0.2: [30]})
    assert list(results.frame(found, "harmful-ratio", "lora")["value"]) == [0.2]
    assert list(results.frame(found, "tasks", "lora")["value"]) == ["sst2"]
    assert found["commands"]["experiment"].tolist() == ["tasks", "harmful-ratio"]


def test_words_stay_words(tmp_path: Path) -> None:
    """What readers of tables like to guess about: these are words, and none of them is missing."""
    words = ["NA", "null", "007", "", "1.0", "true", '"', "a\nb", "a,b"]
    said = [{"prompt": f"p{n}", "answer": word, "complies": True} for n, word in enumerate(words)]
    pairs = [(0.1, record("sft", 0, 1, answers=said))]
    results.save(results.added(results.load(tmp_path), "tasks", "lora", "", pairs), tmp_path)
    found = results.load(tmp_path)["answers"]
    assert found[found["prompt"].str.startswith("p")]["text"].tolist() == words


def test_the_papers_numbers_stand_beside_ours_where_there_are_any(tmp_path: Path) -> None:
    of_p = details(published(tmp_path, sft={0.1: [1]}))
    assert row(of_p, "The paper", "Booster")[-1] == "10.94"
    study = details(published(tmp_path, "perturbation-study", sft={1.0: [1]}), "perturbation-study")
    assert row(study, "The paper", "harmful data: harmful score, %")[:3] == ["1", "8", "20"]
    other = details(published(tmp_path, "combinations", sft={0.1: [1]}), "combinations")
    assert "The paper" not in other


def test_costs_are_shown(tmp_path: Path) -> None:
    text = details(published(tmp_path, sft={0.1: [1]}, booster={0.1: [1]}))
    assert row(text, "Cost", "Booster") == ["3.0", "10.0", "12.3"]


def test_what_models_say_is_no_markup(tmp_path: Path) -> None:
    found = published(tmp_path, sft={0.1: [1]}, booster={0.1: [2]})
    text = tables.said(found, "harmful-ratio", "lora", 1)
    assert "how &#124; &#60;b>" in " ".join(text.split())
    assert "(does not comply) no 1" in text


# ---------------------------------------------------------------------- targets


def table_1(
    folder: Path, booster: list[float], accuracy: float = 90.0, trained: str = "lora"
) -> list[str]:
    every = (0.0, *paper.POISON_RATIOS)
    pairs = [
        (p, record(method, seed, 50.0 + seed))
        for method in paper.METHODS[:-1]
        for p in every
        for seed in range(len(booster))
    ]
    pairs += [
        (p, record("booster", seed, score, accuracy))
        for p in every
        for seed, score in enumerate(booster)
    ]
    found = results.added(results.load(folder), "harmful-ratio", trained, "", pairs)
    answers = tables.answers(found, "harmful-ratio", trained)
    return [claim.row()[-1] for claim in page.claims("harmful-ratio", trained, answers)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (([20, 25],), ["met", "met", "met"]),
        (([30, 31],), [*["missed: below the target"] * 2, "met"]),
        (([20, 25], 89), ["missed: finetune accuracy lower"] * 3),
        (([20],), ["missed: one seed"] * 3),
        (
            ([0, 0, 100],),
            [
                *["missed: below the target, interval not above zero"] * 2,
                "missed: interval not above zero",
            ],
        ),
        (([0, 0], 90, "full"), [*["missed: below the target"] * 2, "met"]),
        (([60, 60],), ["missed: below the target, interval not above zero"] * 3),
    ],
)
def test_verdicts(given: tuple[Any, ...], expected: list[str], tmp_path: Path) -> None:
    assert table_1(tmp_path, *given) == expected


# ---------------------------------------------------------------------- what is published


@pytest.fixture(scope="module")
def ours() -> results.Tables:
    return results.load()


def test_results_are_small_and_diffable() -> None:
    files = [file for file in RESULTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < SIZE
    assert {file.suffix for file in files} <= {".csv", ".json", ".jsonl", ".png"}
    shown = (RESULTS.parent / "README.md").read_text()
    for picture in (file for file in files if file.suffix == ".png"):
        assert f"({picture.relative_to(RESULTS.parent)})" in shown


def test_every_fact_is_in_one_place(ours: results.Tables) -> None:
    for name, keys in results.KEYS.items():
        assert not ours[name].duplicated(keys).any(), name
    runs = ours["runs"]
    assert set(ours["experiments"]["run"]) == set(runs["run"]) == set(ours["curves"]["run"])
    assert set(runs["trace"]) == set(ours["traces"]["trace"])
    assert set(runs["settings"]) == set(ours["settings"]["settings"])
    named = {
        name for names in runs["answers"] + " " + runs["answers_before"] for name in names.split()
    }
    assert named == set(ours["answers"]["answer"])


def test_a_score_after_the_attack_is_the_end_of_its_curve(ours: results.Tables) -> None:
    last = ours["curves"].groupby("run").last()["harmful_score"]
    after = ours["runs"].set_index("run")["after_harmful_score"]
    assert (last - after[last.index]).abs().max() < 1e-4


def test_every_published_experiment_has_its_tables(ours: results.Tables) -> None:
    rows = ours["experiments"][["round", "experiment", "trained"]].drop_duplicates()
    for round_, name, trained in rows.itertuples(index=False):
        text = tables.details(ours, name, trained, round_)
        assert "### Time to break" in text
        assert "nan" not in re.sub(r"\b\w*nan\w+", "", text)


def test_every_published_experiment_is_on_the_page(ours: results.Tables) -> None:
    asked = re.findall(r"\{\{ experiment (.+?) \}\}", page.TEMPLATE.read_text())
    rows = ours["experiments"][["experiment", "trained", "round"]].drop_duplicates()
    there = {" ".join(row).strip() for row in rows.itertuples(index=False)}
    assert set(asked) == there - {"qualitative full"}
    assert {name.split()[0] for name in asked} <= {
        *EXPERIMENTS,
        "demo",
        "stories260k",
        "kind-ratio",
    }


def test_the_page_is_what_the_tables_give(ours: results.Tables) -> None:
    assert page.text(ours) == (ROOT / "docs" / "results.md").read_text()


def test_sentences_of_the_page_are_plain() -> None:
    """No sentence with more than three numbers."""
    prose = re.sub(r"`[^`]*`|\(https?:[^)]*\)", "", page.TEMPLATE.read_text())
    prose = re.sub(r"\{\{[^}]*\}\}", "1", prose)
    for sentence in re.split(r"(?<=[.:?])\s|\n\n|\n- ", prose):
        assert len(re.findall(r"\d[\d,.]*", sentence)) <= 3, sentence


def test_figures_are_what_the_tables_give(ours: results.Tables, tmp_path: Path) -> None:
    files = page.write(ours, tmp_path)
    drawn = {file.name: file.read_bytes() for file in files if file.suffix == ".svg"}
    kept = {name: (ROOT / "docs" / "images" / name).read_bytes() for name in drawn}
    assert len(drawn) == len(figures.FIGURES)
    pinned = (ROOT / "constraints.txt").read_text()
    if f"matplotlib=={mpl.__version__};" not in pinned:
        pytest.skip("another matplotlib than the pinned one places things differently")
    assert kept == drawn


def test_methods_are_told_apart_without_colour() -> None:
    looks = list(figures.LOOKS.values())
    assert set(figures.LOOKS) <= set(METHODS)
    assert (
        len({look.marker for look in looks}) == len({look.dashes for look in looks}) == len(looks)
    )
    for name, draw in figures.FIGURES.items():
        with figures.plain_svg():
            figure = draw(results.load())
        assert re.search("line|point|dot", figure.get_supxlabel()), name  # says what is drawn


def test_a_page_that_asks_for_nothing_known_is_refused(
    ours: results.Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "page.md"
    template.write_text("{{ nothing }}")
    monkeypatch.setattr(page, "TEMPLATE", template)
    with pytest.raises(ValueError, match="asks for 'nothing'; there is experiment"):
        page.text(ours)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    for content in ("step\n1\n", '{"a": 1'):
        file = tmp_path / ("runs.csv" if content[0] == "s" else "settings.jsonl")
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"{file.name} can not be read, mend or remove it"):
            results.load(tmp_path)
        file.unlink()


def test_settings_are_nested_as_a_configuration_file_is(ours: results.Tables) -> None:
    for values in ours["settings"]["values"]:
        assert "attack" in values or "arguments" in values
        json.dumps(values)
