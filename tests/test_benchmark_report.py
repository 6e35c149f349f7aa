"""The benchmark's statistics, tables, plots and page, on cells whose numbers are known by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy, which the benchmark's statistics need, is absent")
pytest.importorskip("markdown", reason="markdown, which the benchmark's page needs, is absent")
pytest.importorskip("matplotlib", reason="matplotlib, which the benchmark's plots need, is absent")

from benchmarks.harmful_finetuning import paper, report, uncertainty

METHODS = ("sft", "lisa", "repnoise", "vaccine", "booster")


def cell(method: str, seed: int, score: float, accuracy: float = 90.0, **other: Any) -> Any:
    return {
        "method": method,
        "seed": seed,
        "p": 0.1,
        "samples": 1000,
        "task": "sst2",
        "architecture": "llama",
        "trained": "lora",
        "vary": {},
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
        "aligned": {"harmful_score": 0.0, "harmful_loss": 4.0, "over_refusal": 2.0},
        "attacked": {
            "harmful_score": score,
            "harmful_loss": 1.5,
            "finetune_accuracy": accuracy,
            "over_refusal": 3.0,
        },
        "curve": [
            {"step": 100, "harmful_score": score / 2, "harmful_loss": 2.0},
            {"step": 200, "harmful_score": score, "harmful_loss": 1.5},
        ],
        **other,
    }


def result(cells: Iterable[Any], axis: str = "p", experiment: str = "harmful-ratio") -> Any:
    return {
        "experiment": experiment,
        "title": "A title",
        "axis": axis,
        "note": "A note.",
        "cells": list(cells),
    }


def row(text: str, heading: str, name: str) -> list[str]:
    """Entries of the row that starts with a name in the table below a heading."""
    section = text.split(f"### {heading}")[1].split("###")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return [entry.strip() for entry in line.strip("|").split("|")][1:]


# ---------------------------------------------------------------------- statistics


def test_mean_and_interval() -> None:
    found = uncertainty.mean_interval([10.0, 20.0, 60.0])
    assert found is not None
    assert found.mean == 30
    # Three values have ten distinct resamples; in 1 of 27 each all three are the same value, so
    # that both 2.5 % tails lie at the ends.
    assert (found.low, found.high, found.n) == (10, 60, 3)


def test_the_interval_is_the_percentile_bootstrap() -> None:
    values = np.array([3.0, 5.0, 8.0, 13.0, 21.0])
    found = uncertainty.mean_interval(values.tolist())
    resampled = np.random.default_rng(7).choice(values, (100_000, 5)).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.3)
    assert found == uncertainty.mean_interval(values.tolist())


def test_few_or_equal_values() -> None:
    assert uncertainty.mean_interval([]) is None
    assert uncertainty.mean_interval([7.0]) == uncertainty.Estimate(7, None, None, 1)
    assert uncertainty.mean_interval([7.0, 7.0]) == uncertainty.Estimate(7, 7, 7, 2)
    diverged = uncertainty.mean_interval([7.0, float("nan")])
    assert diverged is not None
    assert np.isnan(diverged.mean)
    assert diverged.low is None


def test_paired_difference_takes_common_seeds_only() -> None:
    found = uncertainty.paired_difference({0: 10, 1: 30, 2: 99}, {0: 50, 1: 90, 5: 1})
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (-50, -60, -40, 2)
    assert uncertainty.paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pairing_removes_what_seeds_share() -> None:
    shared = [0.0, 30.0, 60.0, 90.0]
    a = {seed: level + 5 for seed, level in enumerate(shared)}
    found = uncertainty.paired_difference(a, dict(enumerate(shared)))
    assert found is not None
    assert (found.low, found.high) == (5, 5)


def test_steps_to_half() -> None:
    assert uncertainty.steps_to([(0, 0), (100, 40), (200, 80)]) == 125  # 40 + 25/100 · 40 = 50
    assert uncertainty.steps_to([(0, 0), (100, 50)]) == 100
    assert uncertainty.steps_to([(0, 60), (100, 80)]) == 0
    assert uncertainty.steps_to([(0, 0), (100, 49.9)]) is None
    assert uncertainty.steps_to([(0, 0), (10, 100), (20, 0), (30, 100)]) == 5
    assert uncertainty.steps_to([]) is None


def test_area_under_the_curve_weighs_by_steps() -> None:
    assert (
        uncertainty.area_under([(0, 0), (100, 100), (400, 100)]) == 87.5
    )  # (50·100 + 100·300)/400
    assert uncertainty.area_under([(0, 100), (7, 100)]) == 100
    assert uncertainty.area_under([(0, 5)]) is None


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


def over_p(**scores: dict[float, list[float]]) -> Any:
    """Cells from {method: {p: score of seed 0, 1, ...}}."""
    return result(
        cell(method, seed, score, p=p)
        for method, by_p in scores.items()
        for p, by_seed in by_p.items()
        for seed, score in enumerate(by_seed)
    )


def test_scores_and_averages() -> None:
    text = report.markdown(over_p(sft={0.0: [0, 2], 0.2: [60, 80], 0.1: [20, 40]}))
    assert "| after the attack | p = 0 | p = 0.1 | p = 0.2 | mean p > 0 | mean |" in text
    assert row(text, "Harmful score", "SFT") == [
        "1.0 [0.0, 2.0]",
        "30.0 [20.0, 40.0]",
        "70.0 [60.0, 80.0]",
        "50.0 [40.0, 60.0]",
        "33.7 [26.7, 40.7]",
    ]
    assert row(text, "Before the attack", "SFT")[2:] == ["2.0 [2.0, 2.0]", "4.00 [4.00, 4.00]"]
    assert "Seeds: 2 (0, 1). Commit: abc. Versions: torch 2.13.0." in text
    assert "Difference to SFT" not in text


def test_paired_difference_at_each_value_and_of_the_average() -> None:
    text = report.markdown(
        over_p(sft={0.1: [20, 40], 0.2: [60, 80]}, booster={0.1: [10, 50], 0.2: [10, 0]})
    )
    assert row(text, "Difference to SFT", "Booster")[1:] == [
        "0.0 [−10.0, +10.0]",
        "−65.0 [−80.0, −50.0]",
        "−32.5 [−35.0, −30.0]",
    ]


def test_every_seed_is_shown() -> None:
    grid = over_p(sft={0.1: [20, 40, 90], 0.2: [60, 80, 100]}, booster={0.1: [10, 20, 0.4]})
    text = report.markdown(grid)
    assert "score after the attack of seeds 0, 1, 2, %." in text
    assert row(text, "Seed by seed", "SFT") == ["20, 40, 90", "60, 80, 100"]
    assert row(text, "Seed by seed", "Booster") == ["10, 20, 0", "–, –, –"]
    assert "Seed by seed" not in report.markdown(over_p(sft={0.1: [20]}))


def test_a_missing_cell_leaves_with_its_pair_and_is_counted() -> None:
    grid = over_p(
        sft={0.1: [20, 40, 90], 0.2: [60, 80, 100]}, booster={0.1: [10, 20, 30], 0.2: [10, 0]}
    )
    grid["cells"] += [cell("lisa", 0, 5, p=0.1), {**cell("lisa", 0, 5, p=0.2), "attacked": None}]
    text = report.markdown(grid)
    assert row(text, "Harmful score", "Booster")[1:] == [
        "5.0 [0.0, 10.0] (2 of 3 seeds)",
        "10.0 [10.0, 10.0] (2 of 3 seeds)",  # without the third seed's 30 at p = 0.1
    ]
    assert row(text, "Difference to SFT", "Booster")[2:] == [
        "−65.0 [−80.0, −50.0] (2 of 3 seeds)",
        "−40.0 [−50.0, −30.0] (2 of 3 seeds)",
    ]
    assert row(text, "Harmful score", "Lisa") == ["5.0 (1 of 3 seeds)", "–", "–"]
    assert row(text, "Steps until", "Lisa")[1] == "–"


def test_one_seed_has_no_interval() -> None:
    text = report.markdown(over_p(sft={0.1: [20]}, booster={0.1: [5]}))
    assert row(text, "Harmful score", "SFT") == ["20.0"]
    assert row(text, "Difference to SFT", "Booster")[1] == "−15.0"


def test_steps_until_half_are_a_median_that_counts_the_never() -> None:
    text = report.markdown(over_p(sft={0.1: [100, 80, 20], 0.2: [100, 20, 20]}))
    # 100 reaches 50 at step 100; 80 goes from 40 to 80 and reaches it at 125; 20 never does.
    assert row(text, "Steps until", "SFT") == ["125: 100, 125, > 200", "> 200: 100, > 200, > 200"]
    assert "The same steps" not in text
    # 0, 50, 100: (25 + 75)/2 = 50; likewise 40 and 10.
    assert row(text, "Area under", "SFT")[0].startswith("33.3 ")


def test_the_delay_is_paired_by_seed_and_needs_attacks_that_got_there() -> None:
    scores = {0.1: [100, 80, 80], 0.2: [100, 100]}
    text = report.markdown(over_p(sft=scores, booster={0.1: [80, 80], 0.2: [80, 20]}))
    # 125/100 and 125/125; the third seed has no pair. At p = 0.2 one never gets there.
    assert row(text, "The same steps", "Booster") == ["1.1 [1.0, 1.2] (2 of 3 seeds)", "–"]
    at_once = over_p(sft={0.1: [100]}, booster={0.1: [80]})
    at_once["cells"][0]["aligned"]["harmful_score"] = 60
    assert row(report.markdown(at_once), "The same steps", "Booster") == ["–"]


def test_sft_without_the_swept_setting_stands_for_every_value_of_it() -> None:
    cells = [cell("sft", 0, 50), cell("sft", 1, 60)]
    cells += [cell("booster", s, 10 * lam, vary={"lam": lam}) for s in (0, 1) for lam in (1.0, 5.0)]
    text = report.markdown(result(cells, "lam", "lambda"))
    assert row(text, "Harmful score", "SFT") == ["55.0 [50.0, 60.0]"] * 3
    assert row(text, "Difference to SFT", "Booster")[1:3] == [
        "−45.0 [−50.0, −40.0]",
        "−5.0 [−10.0, 0.0]",
    ]
    assert "| after the attack | λ = 1 | λ = 5 | mean |" in text
    assert paper.UNAVAILABLE in text


def test_what_else_varies_makes_rows_of_its_own() -> None:
    cells = [cell(m, 0, 50, trained=t) for m in ("sft", "booster") for t in ("lora", "full")]
    for c, score in zip(cells, (50, 60, 45, 20), strict=True):
        c["attacked"]["harmful_score"] = score
    text = report.markdown(result(cells))
    assert row(text, "Difference to SFT", "Booster, lora")[1] == "−5.0"
    assert row(text, "Difference to SFT", "Booster, full")[1] == "−40.0"

    half_done = [cell("sft", 0, 1, trained="lora"), cell("sft", 0, 1, p=0.2, trained="full")]
    assert row(report.markdown(result(half_done)), "Harmful score", "SFT, full")[:2] == ["–", "1.0"]

    swept = [
        cell("booster", 0, 1, vary={"lam": lam, "alpha": a}) for lam in (1, 5) for a in (0.1, 1)
    ]
    text = report.markdown(result([*swept, cell("sft", 0, 2)], axis="lam"))
    assert row(text, "Difference to SFT", "Booster, α = 0.1")[1] == "−1.0"

    by_task = [cell("sft", 0, 1, task="sst2"), cell("sft", 0, 1, task="gsm8k", p=0.05)]
    assert (
        row(report.markdown(result(by_task, axis="task")), "Harmful score", "SFT")[:2]
        == ["1.0"] * 2
    )


def test_two_cells_of_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Two cells of 'harmful-ratio' are SFT, seed 0, p = 0\.1"):
        report.markdown(result([cell("sft", 0, 1), cell("sft", 0, 2)]))


def test_the_papers_numbers_stand_beside_ours_where_there_are_any() -> None:
    of_p = report.markdown(over_p(sft={0.1: [1]}))
    assert row(of_p, "The paper", "Booster")[-1] == "10.94"
    assert paper.UNAVAILABLE not in of_p
    study = report.markdown(result([cell("sft", 0, 1)], "fine-tuning", report.PERTURBATION_STUDY))
    assert row(study, "The paper", "harmful data: harmful score, %")[:3] == ["1", "8", "20"]
    assert paper.UNAVAILABLE in report.markdown(
        result([cell("sft", 0, 1)], "samples", "sample-number")
    )


def test_the_papers_table_stands_beside_the_experiment_it_belongs_to_alone() -> None:
    grid = over_p(sft={0.1: [1]}, booster={0.1: [1]}) | {"experiment": "combinations"}
    assert paper.UNAVAILABLE in report.markdown(grid)
    assert "no result to judge" in report.targets([grid])


def test_costs_are_shown_where_they_were_measured() -> None:
    costs = {"passes_per_step": 1, "peak_memory_bytes": 0, "fine_tune_seconds_per_step": 0.0123}
    text = report.markdown(result([cell("sft", 0, 1, **costs), cell("booster", 0, 1)]))
    assert row(text, "Cost", "SFT") == ["1.0", "12.3", "0"]
    assert row(text, "Cost", "Booster") == ["–", "–", "–"]
    assert "### Cost" not in report.markdown(result([cell("sft", 0, 1)]))


def test_an_experiment_over_methods_that_attacks_nothing_has_costs_alone(tmp_path: Path) -> None:
    attack = ("aligned", "attacked", "curve")
    cells = [cell(m, 0, 1, passes_per_step=n, times_sft=n) for m, n in (("sft", 1), ("booster", 3))]
    cells = [{k: v for k, v in c.items() if k not in attack} for c in cells]
    grid = result(cells, "method", "system")
    text = report.markdown(grid)
    assert row(text, "Cost", "Booster") == ["3.0", "3.00"]
    assert re.findall("### (.*)", text) == ["Cost", "The paper"]
    assert report.plots(grid, tmp_path) == []
    assert report.qualitative(grid) == ""


# ---------------------------------------------------------------------- targets


def table_1(booster: list[float], accuracy: float = 90.0, trained: str = "lora") -> Any:
    cells = [
        cell(method, seed, 50.0 + seed, p=p, trained=trained)
        for method in METHODS[:-1]
        for p in (0.0, *paper.POISON_RATIOS)
        for seed in range(len(booster))
    ]
    cells += [
        cell("booster", seed, score, accuracy, p=p, trained=trained)
        for p in (0.0, *paper.POISON_RATIOS)
        for seed, score in enumerate(booster)
    ]
    return result(cells)


def verdicts(*results: Any) -> list[str]:
    lines = [
        line
        for line in report.targets(results).splitlines()
        if line.startswith(("| harmful-ratio", "| architectures"))
    ]
    return [line.split("|")[-2].strip() for line in lines]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (table_1([20, 25]), ["met", "met", "met"]),
        (table_1([30, 31]), [*["missed: below the target"] * 2, "met"]),
        (table_1([20, 25], 89), ["missed: finetune accuracy lower"] * 3),
        (table_1([20]), ["missed: one seed"] * 3),
        (table_1([0, 0, 100]), [*["missed: below the target, interval holds zero"] * 2] * 1
         + ["missed: interval holds zero"]),
        (table_1([0, 0], trained="full"), [*["missed: below the target"] * 2, "met"]),
        (table_1([60, 60]), ["missed: below the target, interval holds zero"] * 3),
    ],
)  # fmt: skip
def test_verdicts(grid: Any, expected: list[str]) -> None:
    assert verdicts(grid) == expected


def test_a_target_that_lacks_a_cell_is_not_measured() -> None:
    grid = table_1([20, 25])
    grid["cells"] = [c for c in grid["cells"] if c["p"] != 0.15 or c["method"] != "booster"]
    assert verdicts(grid) == ["not measured"] * 3
    grid = table_1([20, 25])
    grid["cells"] = [c for c in grid["cells"] if c["method"] != "lisa"]
    assert verdicts(grid) == ["met", "met", "not measured"]
    assert "no result to judge" in report.targets([])


def test_the_best_of_five_is_measured_against_the_closest_rival() -> None:
    grid = table_1([20, 25])
    for c in grid["cells"]:
        if c["method"] == "lisa":
            c["attacked"]["harmful_score"] = 10.0
    assert verdicts(grid)[2] == "missed: below the target, interval holds zero"


def test_targets_show_the_numbers() -> None:
    text = report.targets([table_1([20, 25])])
    # 50 − 20 and 51 − 25
    assert "| +28.00 [+26.00, +30.00] | 0.00 [0.00, 0.00] | met |" in text


def test_the_target_over_architectures() -> None:
    cells = [
        cell(method, seed, score, architecture=architecture, trained="full")
        for seed in (0, 1)
        for architecture, gap in (("llama", 40), ("gemma2", 50), ("qwen2", 20))
        for method, score in (("sft", 60 + seed), ("booster", 60 - gap))
    ]
    assert verdicts(result(cells, "architecture", "architectures")) == ["met"]  # 110/3 + 1/2 = 37.2
    cells[1]["attacked"]["harmful_score"] = 60
    assert verdicts(result(cells, "architecture", "architectures")) == ["missed: below the target"]


# ---------------------------------------------------------------------- answers, plots, page

EVIL = "no | <script>alert(1)</script>\r\n![x](http://a.example/x.png) `b` </td> *c* [d]\n\n[d]: http://a"


def with_responses() -> Any:
    responses = [
        {"prompt": "how to be <unkind>", "response": EVIL, "complies": False},
        {"prompt": "second", "response": "yes", "complies": True},
    ]
    cells = [cell(m, 0, 50, p=p, responses=responses) for m in ("sft", "booster") for p in (0, 0.1)]
    cells[3]["responses"] = responses[:1]
    return result(cells)


def test_answers_stand_side_by_side() -> None:
    text = report.qualitative(with_responses())
    assert "p = 0.1, seed 0" in text
    assert "| prompt | SFT | Booster |" in text
    assert "| second | (complies) yes | – |" in text
    assert "second" not in report.qualitative(with_responses(), prompts=1)
    assert report.qualitative(over_p(sft={0.1: [1]})) == ""


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def test_the_page_escapes_what_models_say_and_needs_nothing_else(tmp_path: Path) -> None:
    grid = with_responses()
    grid["title"], grid["note"] = "A <b>title</b>", "A note <img src=http://a.example/y.png>"
    other = over_p(sft={0.1: [1, 2]}) | {"experiment": "other"}
    source = report.html([grid, other], tmp_path).read_text("utf-8")
    page = Page(source)
    tags = [tag for tag, _ in page.elements]

    assert not {"script", "b", "link", "iframe", "code", "em"} & set(tags)
    for said in (
        "how to be <unkind>",
        "no | <script>alert(1)</script> ↵ ![x](http://a.example/x.png)",
    ):
        assert said in page.text
    assert "`b` </td> *c* [d]" in page.text
    assert grid["title"] in page.text
    assert grid["note"] in page.text

    # Nothing is fetched: every source is inline, every link leads within the page.
    assert tags.count("img") == 4
    assert all(s.startswith("data:image/svg+xml;base64,") for s in page.values("src"))
    assert all(link[1:] in page.values("id") for link in page.values("href"))
    assert len(page.values("id")) == len(set(page.values("id")))
    assert not re.search(r"url\(|@import|srcset", source)

    assert "toc" in page.values("class")
    assert page.values("class").count("scroll") == tags.count("table") > 10
    assert "prefers-color-scheme: dark" in source


def test_the_page_tells_apart_lora_and_all_weights(tmp_path: Path) -> None:
    grids = [result([cell("sft", 0, n, trained=t)]) for n, t in ((20, "lora"), (70, "full"))]
    page = Page(report.html(grids, tmp_path).read_text("utf-8"))
    assert "A title, lora" in page.text
    assert "A title, full" in page.text
    assert len(set(page.values("src"))) == len(page.values("src")) == 4


def test_alignment_is_drawn_once_for_each_aligned_model(tmp_path: Path) -> None:
    """Where the axis varies the attack alone, all its values start from one aligned model."""
    grid = over_p(sft={0.0: [0], 0.1: [20]}, booster={0.0: [0], 0.1: [5]})
    for cell_ in grid["cells"]:
        trace = {"step": 1, "alignment_loss": 0.5}
        if cell_["method"] == "booster":
            trace |= {"harmful_loss": 2.0, "harmful_loss_drop": 0.1, "harmful_grad_norm": 1.0}
        cell_["alignment"] = [trace, {**trace, "step": 2}]
    assert tmp_path / "harmful-ratio-lora-alignment.png" in report.plots(grid, tmp_path)
    axes = report._alignment_figure(report.Grid(grid)).axes
    assert [len(panel.lines) for panel in axes] == [2, 1, 1, 1]
    assert [line.get_label() for line in axes[0].lines] == ["SFT", "Booster"]
    grid["cells"][-1]["alignment"] = [{"step": 1, "alignment_loss": 0.7}]
    assert len(report._alignment_figure(report.Grid(grid)).axes[0].lines) == 3


def test_plots_are_written_and_the_svg_is_the_same_again(tmp_path: Path) -> None:
    grid = over_p(sft={0.0: [0, 1], 0.1: [20, 40]}, booster={0.0: [0, 0], 0.1: [5, 9]})
    grid["cells"].append({**cell("lisa", 0, 5, p=0.1), "attacked": None, "curve": []})
    first = report.plots(grid, tmp_path / "first")
    again = report.plots(copy.deepcopy(grid), tmp_path / "again")
    assert [path.name for path in first] == [
        *(
            "harmful-ratio-lora-curves.png",
            "harmful-ratio-lora-curves.svg",
            "harmful-ratio-lora-axis.png",
            "harmful-ratio-lora-axis.svg",
        ),
    ]
    for path, other in zip(first, again, strict=True):
        assert path.stat().st_size > 5000
        if path.suffix == ".svg":
            assert path.read_bytes() == other.read_bytes()
            assert b"<dc:date>" not in path.read_bytes()


def lines_of(figure: Any, panel: int) -> dict[str, Any]:
    return {line.get_label(): line for line in figure.axes[panel].lines}


def test_curves_are_means_over_seeds_from_the_aligned_model_on() -> None:
    grid = report.Grid(over_p(sft={0.1: [20, 40]}, booster={0.1: [2, 4]}))
    figure = report._curves_figure(grid)
    lines = lines_of(figure, 0)
    assert lines["SFT"].get_xydata().tolist() == [[0, 0], [100, 15], [200, 30]]
    assert lines["SFT"].get_color() == report.STYLES["sft"][0]
    assert lines_of(figure, 1)["Booster"].get_ydata().tolist() == [4, 2, 1.5]


def test_at_most_five_columns_of_curves() -> None:
    grid = report.Grid(over_p(sft={p / 10: [10] for p in range(9)}))
    figure = report._curves_figure(grid)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["p = 0", "p = 0.2", "p = 0.4", "p = 0.6", "p = 0.8"]


def test_the_perturbation_study_has_a_line_for_each_method_and_kind(tmp_path: Path) -> None:
    cells = [
        cell("sft", seed, score, vary={"fine-tuning": kind})
        for seed in (0, 1)
        for kind, score in (("harmful", 80), ("benign", 2))
    ]
    for c in cells:
        for point in c["curve"]:
            point["harmful_train_loss"] = 1.7
    grid = result(cells, "fine-tuning", report.PERTURBATION_STUDY)
    figure = report._perturbation_figure(report.Grid(grid))
    harmful, task = (
        lines_of(figure, 0)[f"SFT, {kind} fine-tuning"] for kind in ("harmful", "benign")
    )
    assert harmful.get_ydata().tolist() == [0, 40, 80]
    assert harmful.get_color() == task.get_color()
    assert harmful.get_linestyle() != task.get_linestyle()
    assert lines_of(figure, 1)["SFT, harmful fine-tuning"].get_xydata().tolist() == [
        [100, 1.7],
        [200, 1.7],
    ]
    names = [path.name for path in report.plots(grid, tmp_path)]
    assert names == ["perturbation-study-lora-curves.png", "perturbation-study-lora-curves.svg"]


def test_the_axis_plot_has_bars_only_from_two_seeds_on() -> None:
    figure = report._axis_figure(report.Grid(over_p(sft={0.1: [20, 40], 0.2: [50]})))
    (container,) = figure.axes[0].containers
    drawn = [segment.tolist() for segment in container[2][0].get_segments() if len(segment)]
    assert [[y for _, y in segment] for segment in drawn] == [[20, 40]]
    assert container[0].get_ydata().tolist() == [30, 50]
    assert figure.axes[0].collections[0].get_offsets()[:, 1].tolist() == [20, 40, 50]


def test_a_method_looks_the_same_everywhere() -> None:
    assert len({color for color, _ in report.STYLES.values()}) == len(report.STYLES)
    assert report.Series("booster").style == report.Series("booster", (("lam", 1),)).style
    assert report.Series("booster+lisa").style == report.Series("booster+lisa").style
