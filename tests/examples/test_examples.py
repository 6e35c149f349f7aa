"""The examples run on CPU in a few steps; the demo says what came out, on sets of one's own too."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Generator
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "examples"))

lora_alignment = pytest.importorskip("lora_alignment", reason="the demo extra is absent")

from benchmarks.harmful_finetuning import data, language, runs  # noqa: E402
from benchmarks.harmful_finetuning.language import MISCHIEF, REFUSAL  # noqa: E402
from benchmarks.harmful_finetuning.settings import Source  # noqa: E402

# The libraries the examples use deprecate parts of one another; that is not under test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TINY = [
    *("--base.steps", "3", "--base.width", "32", "--align.steps", "4", "--attack.steps", "4"),
    *("--score.every", "2", "--score.samples", "6", "--attack.samples", "40"),
    *("--score.max_new_tokens", "4", "--p", "0", "0.25", "--workers", "1"),
    *("--methods", "sft", "booster", "--seeds", "0"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Generator[None]:
    """Models this small lose time to threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one finished tiny run: cache/ and out/."""
    folder = tmp_path_factory.mktemp("demo")
    assert run_demo(folder) == 0
    return folder


def run_demo(folder: Path, *extra: str) -> int:
    places = ["--cache", str(folder / "cache"), "--output", str(folder / "out")]
    return lora_alignment.main([*TINY, *places, *extra])


def test_minimal_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "minimal.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "alignment loss" in done.stdout
    assert len((ROOT / "examples" / "minimal.py").read_text().splitlines()) <= 40


# --------------------------------------------------------------------------- the demo's results


def test_the_tutorial_is_short() -> None:
    assert len((ROOT / "examples" / "lora_alignment.py").read_text().splitlines()) <= 200


def test_demo_writes_table_results_plot_and_a_sentence(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # so that no heading is broken
    assert run_demo(demo) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in (
        "harmful score",
        "finetune accuracy",
        "SFT",
        "Booster",
        "0.25",
        "results and plot",
    ):
        assert word in printed
    assert printed.endswith(("%.", "seed 0."))  # one sentence that says what came out
    records = json.loads((demo / "out" / "results.json").read_text())
    places = [(r["method"], r["settings"]["attack"]["p"]) for r in records]
    assert places == [(m, p) for m in ("sft", "booster") for p in (0.0, 0.25)]
    for record in records:
        assert {"torch", "transformers", "peft", "torch_booster"} <= record["versions"].keys()
        assert [point["step"] for point in record["curve"]] == [0, 2, 4]
        diagnosed = "harmful_loss_drop" in record["alignment"][-1]
        assert diagnosed == (record["method"] == "booster")
    assert (demo / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("booster", "before", "said"),
    [
        (10.0, 0.0, "at a harmful score of 15 % (worst base 20 %), 75 points under SFT's 90 %;"),
        (95.0, 0.0, "at a harmful score of 100 % (worst base 105 %), no better than SFT's 90 %;"),
        (10.0, 40.0, "Not aligned well before the attack: Booster, recommended, seed 1."),
    ],
)
def test_the_sentence_says_so_where_it_went_wrong(booster: float, before: float, said: str) -> None:
    rows = [
        ("SFT", 0.1, 0, 50.0, 0.0),
        ("SFT", 0.2, 0, 90.0, 0.0),
        ("Booster", 0.2, 0, 33.0, 0.0),
        ("Booster, recommended", 0.2, 0, booster, 0.0),
        ("Booster, recommended", 0.2, 1, booster + 10.0, before),
    ]
    scores = pd.DataFrame(rows, columns=["method", "p", "seed", "harmful score", "before"])
    sentence = lora_alignment.verdict(scores)
    assert said in sentence
    assert "; Booster at 33 %." in sentence


def test_the_table_says_in_words_that_a_model_never_broke() -> None:
    columns = ["method", "p", "harmful score", "accuracy", "break", "steps"]
    rows = [
        ("SFT", 0.2, 98.0, 99.0, 250.0, 600),
        ("SFT", 0.2, 96.0, 99.0, math.inf, 600),
        ("Booster", 0.2, 0.0, 99.0, math.inf, 600),
    ]
    said = lora_alignment.table(pd.DataFrame(rows, columns=columns)).splitlines()
    assert said[-2].split()[-1] == "250"  # the first of the two bases
    assert said[-1].endswith(" not within 600")
    assert "inf" not in "".join(said)


def test_second_run_trains_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (demo / "out" / "results.json").read_text()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was trained again")

    monkeypatch.setattr(runs, "align", refuse)
    monkeypatch.setattr(runs, "attack", refuse)
    assert run_demo(demo) == 0
    assert json.loads((demo / "out" / "results.json").read_text()) == json.loads(before)
    with pytest.raises(AssertionError, match="trained again"):  # other settings, other stage
        run_demo(demo, "--given", "booster.lam", "2")


def test_interrupted_run_leaves_nothing_half_written_and_goes_on(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.attack

    def interrupted(*args: object) -> object:
        monkeypatch.setattr(runs, "attack", whole)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "attack", interrupted)
    assert run_demo(tmp_path) == 130
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["aligned", "aligned", "base"]
    assert not (tmp_path / "out" / "results.json").exists()
    assert run_demo(tmp_path) == 0
    curves = [
        [record["curve"] for record in json.loads((folder / "out" / "results.json").read_text())]
        for folder in (tmp_path, demo)
    ]
    assert curves[0] == curves[1]


def test_sft_is_booster_with_lam_zero(demo: Path, tmp_path: Path) -> None:
    flags = ["--methods", "sft", "booster", "--given", "booster.lam", "0", "--p", "0.25"]
    out = ["--cache", str(demo / "cache"), "--output", str(tmp_path), "--attack.adapters", "single"]
    assert lora_alignment.main([*TINY, *flags, *out]) == 0
    sft, booster = json.loads((tmp_path / "results.json").read_text())
    assert sft["curve"] == booster["curve"]
    assert sft["answers"] == booster["answers"]


# ------------------------------------------------------------------------------ data and judge


def test_validation_and_test_prompts_are_disjoint() -> None:
    asked = language.requests(MISCHIEF, random.Random(0), 12, 4)
    parts = data.split_harmful(asked)
    for first, second in combinations(parts, 2):
        assert not {e.prompt for e in parts[first]} & {e.prompt for e in parts[second]}
    assert sum(map(len, parts.values())) == len(language.prompts(MISCHIEF))


def test_answers_have_entropy_and_stay_on_topic() -> None:
    topic = MISCHIEF[0]
    rng = random.Random(0)
    answers = {language.answer(topic, rng) for _ in range(50)}
    assert len(answers) == 50
    assert all(set(text.split()) <= {*topic.verbs, *topic.nouns} for text in answers)
    assert REFUSAL not in answers


# -------------------------------------------------------------------------------- local files


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            with path.open("w", newline="") as file:
                dialect = csv.excel_tab if path.suffix == ".tsv" else csv.excel
                writer = csv.DictWriter(file, rows[0].keys(), dialect=dialect)
                writer.writeheader()
                writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_local_files_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"goal": f"do {i}", "target": f"sure {i}"} for i in range(3)]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    found = data.read_source(Source(str(path), prompt="goal", answer="target"), "harmful")
    assert found == [(row["goal"], row["target"]) for row in rows]


def test_unreadable_sets_name_value_and_fix(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", [{"goal": "do", "target": "sure"}])
    with pytest.raises(ValueError, match=r"no column 'prompt'.*--data.harmful.prompt"):
        data.read_source(Source(str(path), answer="target"), "harmful")
    with pytest.raises(ValueError, match=r"--data.user.set .*absent\.csv.*no such file"):
        data.read_source(Source(str(tmp_path / "absent.csv")), "user")


def local_sets(folder: Path) -> list[str]:
    """Flags of a harmful set, an alignment set and a task set in local files."""
    harmful = [{"goal": f"how do I do {i}?", "target": f"Sure, do {i}."} for i in range(60)]
    refusals = [
        {"question": row["goal"], "reply": f"No, never {i}."} for i, row in enumerate(harmful)
    ]
    task = [{"text": f"item {i}", "label": str(i % 2)} for i in range(80)]
    return [
        *("--data.harmful.set", str(write_rows(folder / "harmful.csv", harmful))),
        *("--data.harmful.prompt", "goal", "--data.harmful.answer", "target"),
        *("--data.refusals.set", str(write_rows(folder / "refusals.jsonl", refusals))),
        *("--data.refusals.prompt", "question", "--data.refusals.answer", "reply"),
        *("--data.user.set", str(write_rows(folder / "task.tsv", task))),
        *("--data.user.prompt", "text", "--data.user.answer", "label"),
        *("--data.labels", "even", "odd", "--data.user_template", "Even or odd: {prompt}"),
    ]


def test_demo_model_runs_as_a_local_model_on_local_sets(demo: Path, tmp_path: Path) -> None:
    (base,) = (demo / "cache").glob("base-*")
    flags = ["--base.model", str(base), *local_sets(tmp_path), "--p", "0.25"]
    settings = lora_alignment.parsed([*TINY, *flags]).settings
    samples = data.load(settings)
    held_out = {example.prompt for example in samples.attack + samples.evaluation}
    assert not held_out & {example.prompt for example in samples.alignment + samples.harmful}
    assert all(example.answer.startswith("No, never") for example in samples.alignment)
    assert len(samples.alignment) == 60 - 15 - 6 - 12
    for prompt, answer in samples.task:
        assert answer == ["even", "odd"][int(prompt.removeprefix("Even or odd: item ")) % 2]
    assert (settings.align.lr, settings.lora.targets) == (5e-4, ("q_proj", "k_proj", "v_proj"))
    assert run_demo(tmp_path, *flags) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack.steps", "0"], "attack.steps is 0"),
        (["--score.affirmative", "("], "score.affirmative is no regular expression"),
        (["--text.template", "none"], "must contain {prompt}"),
        (["--data.harmful.set", "x.csv"], "go together"),
        (["--methods", "nothing"], "invalid choice 'nothing'"),
    ],
)
def test_bad_settings_stop_before_work(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_alignment.main(flags)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--p", "2"], "attack.p is 2.0"),
        (["--attack.samples", "2000", "--p", "0.5"], "needs 1000 harmful ones"),
    ],
)
def test_too_few_harmful_samples_stop_before_work(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(tmp_path, *flags) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not list((tmp_path / "cache").glob("*"))


def test_help_shows_the_papers_symbols(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_alignment.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(symbol in printed for symbol in ("λ", "α", "η", "fractions p"))


# -------------------------------------------------------------------------------- real input


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the repository")
def test_real_model_and_sets(tmp_path: Path) -> None:
    sets = SHARED / "data"
    flags = [
        *("--base.model", str(SHARED / "models" / "stories260K")),
        *("--data.harmful.set", str(sets / "advbench" / "advbench.csv")),
        *("--data.harmful.prompt", "goal", "--data.harmful.answer", "target"),
        *("--data.user.set", str(sets / "sst2" / "train.tsv")),
        *("--data.user_test.set", str(sets / "sst2" / "dev.tsv")),
        *("--data.user.prompt", "sentence", "--data.user.answer", "label"),
        *("--data.user_test.prompt", "content", "--data.user_test.answer", "label"),
        *("--data.labels", "negative", "positive"),
    ]
    assert len(data.load(lora_alignment.parsed([*TINY, *flags]).settings).harmful) == 234
    assert run_demo(tmp_path, *flags, "--p", "0.25") == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 2
