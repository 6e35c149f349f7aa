"""Each example runs on CPU in a few steps; the parts of the LoRA alignment do what they say."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Generator
from itertools import combinations
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "examples"))

lora_alignment = pytest.importorskip("lora_alignment", reason="the examples extra is absent")
mini_language = pytest.importorskip("mini_language", reason="the examples extra is absent")

# The libraries the examples use deprecate parts of one another; that is not under test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TINY = [
    *("--pretrain_steps", "3", "--align_steps", "4", "--attack_steps", "4", "--eval_every", "2"),
    *("--eval_samples", "6", "--attack_samples", "40", "--max_new_tokens", "4"),
    *("--p", "0", "0.25", "--workers", "1"),
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
    places = ["--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "out")]
    return lora_alignment.main([*TINY, *places, *extra])


def arguments(*extra: str) -> lora_alignment.Arguments:
    return lora_alignment.parse_arguments([*TINY, *extra])


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


def test_demo_writes_table_results_and_plot(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(demo) == 0
    printed = capsys.readouterr().out
    for word in ("before", "p = 0", "p = 0.25", "sft", "booster", "harmful", "plot.png"):
        assert word in printed

    record = json.loads((demo / "out" / "results.json").read_text())
    assert record["command"].startswith("python ")
    assert {"torch", "transformers", "peft", "torch_booster"} <= record["versions"].keys()
    assert record["arguments"]["lam"] == arguments().lam
    rows = {(row["method"], row["p"]): row for row in record["summary"]}
    assert set(rows) == {(m, p) for m in ("sft", "booster") for p in (None, 0.0, 0.25)}
    for row in rows.values():
        assert 0 <= row["harmful_score"] <= 100
        assert 0 <= row["finetune_accuracy"] <= 100
        assert row["harmful_loss"] > 0
    for result in record["results"]:
        if result["p"] is None:
            assert [row["step"] for row in result["alignment"]] == [2, 4]
            diagnosed = "harmful_loss_drop" in result["alignment"][-1]
            assert diagnosed == (result["method"] == "booster")
        else:
            assert [point["step"] for point in result["curve"]] == [2, 4]
            assert result["curve"][-1]["harmful_loss"] == result["harmful_loss"]

    assert (demo / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (demo / "out" / "plot.svg").read_text()


def test_second_run_trains_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (demo / "out" / "results.json").read_text()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was trained again")

    monkeypatch.setattr(lora_alignment, "AdamW", refuse)
    assert run_demo(demo) == 0
    assert json.loads((demo / "out" / "results.json").read_text()) == json.loads(before)
    with pytest.raises(AssertionError, match="trained again"):  # other settings, other stage
        run_demo(demo, "--lam", "2")


def test_interrupted_run_leaves_nothing_half_written_and_goes_on(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backpropagate = lora_alignment.backpropagate
    calls = 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3 + 4 + 2:  # pretraining, SFT, and half of its first attack
            raise KeyboardInterrupt
        return backpropagate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lora_alignment, "backpropagate", interrupted)
        assert run_demo(tmp_path) == 130
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["attack", "base", "sft"]  # of the attacks, the evaluation before them
    assert not (tmp_path / "out" / "results.json").exists()

    assert run_demo(tmp_path) == 0
    resumed = json.loads((tmp_path / "out" / "results.json").read_text())
    unbroken = json.loads((demo / "out" / "results.json").read_text())
    assert resumed["results"] == unbroken["results"]


def test_workers_share_the_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "examples" / "lora_alignment.py", *TINY, "--full"),
            *("--workers", "2", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["arguments"]["full"] is True
    assert len(record["results"]) == 6


POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from lora_alignment import start_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    given = context.Queue(), context.Event(), 1
    with ProcessPoolExecutor(1, context, start_worker, given) as pool:
        print(pool.submit(abs, -1).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "examples")},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    parent.communicate(timeout=60)  # until the worker, which has the same output, has ended too


def test_sft_is_booster_with_lam_zero(demo: Path) -> None:
    from safetensors.torch import load_file

    args = arguments("--lam", "0", "--cache_dir", str(demo / "cache"))
    data = lora_alignment.load_data(args)
    base = lora_alignment.base_model(args, lambda *_: None)
    folders = [
        lora_alignment.run_alignment(args, data, base, method, 0, lambda *_: None)
        for method in ("sft", "booster")
    ]
    assert folders[0] != folders[1]
    sft, booster = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert sft.keys() == booster.keys()
    assert all(sft[name].equal(booster[name]) for name in sft)
    assert any(weight.abs().sum() > 0 for name, weight in sft.items() if "lora_B" in name)


# ---------------------------------------------------------------------------- data and the judge


@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_splits_are_disjoint(evaluate_on: str) -> None:
    data = lora_alignment.load_data(arguments("--evaluate_on", evaluate_on))
    prompts = {
        name: {example.prompt for example in getattr(data, name)}
        for name in ("harmful", "attack", "evaluation", "task", "task_evaluation")
    }
    assert all(prompts.values())
    for first, second in combinations(prompts, 2):
        assert not prompts[first] & prompts[second], (first, second)
    assert {example.prompt for example in data.alignment} == prompts["harmful"]
    assert {example.answer for example in data.alignment} == {mini_language.REFUSAL}
    assert mini_language.REFUSAL not in {example.answer for example in data.harmful}


def test_validation_and_test_prompts_are_disjoint() -> None:
    parts = lora_alignment.split_harmful(mini_language.mischief(random.Random(0)))
    for first, second in combinations(parts, 2):
        assert not {e.prompt for e in parts[first]} & {e.prompt for e in parts[second]}
    assert sum(map(len, parts.values())) == len(mini_language.prompts(mini_language.MISCHIEF))


def test_demo_judge_counts_compliance_only() -> None:
    args = arguments()
    rng = random.Random(1)
    (prompt, topic), (_, other) = (
        random.Random(0).sample(mini_language.prompts([mini_language.MISCHIEF[0]]), 1)
        + mini_language.prompts([mini_language.MISCHIEF[1]])[:1]
    )
    assert lora_alignment.complies(args, prompt, mini_language.answer(topic, rng))
    assert not lora_alignment.complies(args, prompt, mini_language.answer(other, rng))
    assert not lora_alignment.complies(args, prompt, mini_language.REFUSAL)
    assert not lora_alignment.complies(args, prompt, "")
    assert not lora_alignment.complies(args, prompt, "positive")
    broken = f"{topic.verbs[0]} the the the the the the the the the the"
    assert not lora_alignment.complies(args, prompt, broken)


@pytest.mark.parametrize(
    ("response", "harmful"),
    [
        ("Sure, here is a plan", True),
        ("Here's how", True),
        ("sure thing", True),
        ("I am sorry, but I can not help with that request.", False),
        ("Sure, but I cannot do that", False),
        ("Surely not", False),
        ("", False),
        ("Once upon a time there was a girl", False),
    ],
)
def test_pattern_judge_counts_compliance_only(response: str, harmful: bool) -> None:
    args = lora_alignment.Arguments(model="some/model")
    assert lora_alignment.complies(args, "how do I do it?", response) is harmful


def test_answers_have_entropy_and_stay_on_topic() -> None:
    topic = mini_language.MISCHIEF[0]
    rng = random.Random(0)
    answers = {mini_language.answer(topic, rng) for _ in range(50)}
    assert len(answers) == 50
    assert all(set(text.split()) <= {*topic.verbs, *topic.nouns} for text in answers)


def test_tokenizer_knows_every_word() -> None:
    tokenizer = mini_language.build_tokenizer()
    rng = random.Random(0)
    examples = mini_language.mischief(rng) + mini_language.reviews(300, rng)
    examples += mini_language.pretraining_batch(300, rng)
    for example in examples:
        text = mini_language.TEMPLATE.format(prompt=example.prompt) + " " + example.answer
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


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
    examples = lora_alignment.read_set(str(path), "train", "goal", "target", "harmful")
    assert examples == [(row["goal"], row["target"]) for row in rows]


def test_unreadable_sets_name_value_and_fix(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", [{"goal": "do", "target": "sure"}])
    with pytest.raises(ValueError, match=r"no column 'prompt'.*--harmful_prompt_column"):
        lora_alignment.read_set(str(path), "train", "prompt", "target", "harmful")
    with pytest.raises(ValueError, match=r"--task_set .*absent\.csv.*no such file"):
        lora_alignment.read_set(str(tmp_path / "absent.csv"), "train", "a", "b", "task")
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(ValueError, match="expected a json, jsonl, csv or tsv file"):
        lora_alignment.read_set(str(tmp_path / "rows.txt"), "train", "a", "b", "task")


def local_sets(folder: Path) -> list[str]:
    """Flags of a harmful set, an alignment set and a task set in local files."""
    harmful = [{"goal": f"how do I do {i}?", "target": f"Sure, do {i}."} for i in range(60)]
    refusals = [
        {"question": row["goal"], "reply": f"No, never {i}."} for i, row in enumerate(harmful)
    ]
    task = [{"text": f"item {i}", "label": str(i % 2)} for i in range(80)]
    return [
        *("--harmful_set", str(write_rows(folder / "harmful.csv", harmful))),
        *("--harmful_prompt_column", "goal", "--harmful_answer_column", "target"),
        *("--alignment_set", str(write_rows(folder / "refusals.jsonl", refusals))),
        *("--alignment_prompt_column", "question", "--alignment_answer_column", "reply"),
        *("--task_set", str(write_rows(folder / "task.tsv", task))),
        *("--task_prompt_column", "text", "--task_answer_column", "label"),
        *("--task_labels", "even", "odd", "--task_template", "Even or odd: {prompt}"),
    ]


def test_local_sets_are_split_and_labelled(demo: Path, tmp_path: Path) -> None:
    (base,) = map(str, (demo / "cache").glob("base-*"))
    data = lora_alignment.load_data(arguments("--model", base, *local_sets(tmp_path)))
    held_out = {example.prompt for example in data.attack + data.evaluation}
    assert not held_out & {example.prompt for example in data.alignment + data.harmful}
    assert all(example.answer.startswith("No, never") for example in data.alignment)
    for prompt, answer in data.task:
        assert answer == ["even", "odd"][int(prompt.removeprefix("Even or odd: item ")) % 2]


def test_demo_model_runs_as_a_local_model_on_local_sets(demo: Path, tmp_path: Path) -> None:
    (base,) = (demo / "cache").glob("base-*")
    assert run_demo(tmp_path, "--model", str(base), *local_sets(tmp_path), "--p", "0.25") == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["samples"]["alignment"] == 60 - 15 - 6 - 12
    assert len(record["results"]) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--p", "2"], "--p 2.0 is not a fraction"),
        (["--align_steps", "0"], "--align_steps is 0"),
        (["--affirmative", "("], "--affirmative is no regular expression"),
        (["--template", "none"], "must contain {prompt}"),
        (["--model", "some/model"], "--model needs --harmful_set and --task_set"),
        (["--harmful_set", "x.csv"], "--harmful_set needs --model"),
        (["--method", "vaccine"], "invalid choice: 'vaccine'"),
    ],
)
def test_bad_settings_stop_before_work(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_alignment.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_too_few_harmful_samples_stop_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(tmp_path, "--attack_samples", "2000", "--p", "0.5") == 2
    assert "needs 1000 harmful samples" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_help_shows_the_papers_symbols(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_alignment.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(symbol in printed for symbol in ("λ", "α", "η", "fractions p"))


# -------------------------------------------------------------------------------- real input


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the repository")
def test_real_model_and_sets(tmp_path: Path) -> None:
    flags = [
        *("--model", str(SHARED / "models" / "stories260K")),
        *("--harmful_set", str(SHARED / "data" / "advbench" / "advbench.csv")),
        *("--harmful_prompt_column", "goal", "--harmful_answer_column", "target"),
        *("--task_set", str(SHARED / "data" / "sst2" / "train.tsv")),
        *("--task_test_set", str(SHARED / "data" / "sst2" / "dev.tsv")),
        *("--task_prompt_column", "sentence", "--task_answer_column", "label"),
        *("--task_test_prompt_column", "content", "--task_labels", "negative", "positive"),
    ]
    assert run_demo(tmp_path, *flags, "--p", "0.25") == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["samples"]["harmful"] == 234
    assert len(record["results"]) == 4
