"""Hostile and unlucky files: a message that names file, row and remedy, and nothing is run.

Every command line runs in this process on small real files. An error of the user ends in a status
that is not zero and one message; an exception that escapes fails the test.
"""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

lora_alignment = pytest.importorskip("lora_alignment", reason="the examples extra is absent")
inputs = pytest.importorskip("inputs", reason="the examples extra is absent")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.harmful_finetuning import __main__ as benchmark  # noqa: E402
from benchmarks.harmful_finetuning import (  # noqa: E402
    data,
    files,
    language,
    models,
    presets,
    score,
    tokens,
)
from benchmarks.harmful_finetuning.language import Example  # noqa: E402
from benchmarks.harmful_finetuning.settings import (  # noqa: E402
    REFUSAL,
    Source,
    Text,
    changed,
)
from tests.conftest import Counts  # noqa: E402

# The libraries the examples use deprecate parts of one another; that is not under test.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing`:FutureWarning"),
]

QUICK = presets.preset("quick")
Main = Callable[[list[str]], object]


def trainer_example(name: str) -> Any:
    return pytest.importorskip(name, reason="datasets or trl is not installed")


Said = Callable[[Main, Sequence[object]], str]


@pytest.fixture
def said(
    capsys: pytest.CaptureFixture[str], counts: Counts, request: pytest.FixtureRequest
) -> Said:
    """Returns what a command line that ends in an error says, once that was checked."""

    def said(main: Main, argv: Sequence[object]) -> str:
        capsys.readouterr()
        try:
            status = main([str(word) for word in argv])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        text = " ".join((printed.out + printed.err).split())
        assert status == 2, text
        assert "Traceback" not in text
        if request.node.get_closest_marker("reliability"):
            counts.add("hostile input file", 1, 0)
        return text

    return said


def rarely(values: Iterable[str], often: Iterable[str]) -> list[Any]:
    """Parameters of which a few are tried in every run, and all in a run of reliability."""
    rare = pytest.mark.reliability
    return [value if value in often else pytest.param(value, marks=rare) for value in values]


class Payload:
    """Unpickled, it makes the folder: what a malicious file would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


def poison(file: Path, marker: Path) -> None:
    """Writes a malicious file in the format that its reader expects, and tries it."""
    torch.save(Payload(marker), file)
    torch.load(file, weights_only=False)
    marker.rmdir()


# ------------------------------------------------------------------------------- good inputs


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = language.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


PROMPTS = [f"how do i {word} it today ?" for word in ("bake", "mend", "paint", "count") * 15]
PAIRS = [(f"{prompt} {n}", "tiptoe upstairs wait") for n, prompt in enumerate(PROMPTS)]


def jsonl(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def pairs(file: Path, names: Sequence[str] = ("prompt", "answer"), rows: Any = PAIRS) -> Path:
    return jsonl(file, [dict(zip(names, row, strict=True)) for row in rows])


def lora_flags(folder: Path, model: Path, *extra: object, **sets: Path) -> list[object]:
    """A run of seconds on local sets, of which some may be others."""
    task = [(f"is it fresh ? {n}", str(n % 2)) for n in range(60)]
    usual = {
        "harmful": pairs(folder / "usual_harmful.jsonl"),
        "task": pairs(folder / "usual_task.jsonl", rows=task),
    }
    files = usual | sets
    return [
        *("--base.model", model, "--data.harmful.set", files["harmful"]),
        *("--data.user.set", files["task"]),
        *("--align.steps", 1, "--attack.steps", 1, "--score.every", 1, "--score.samples", 4),
        *("--attack.samples", 20, "--score.max_new_tokens", 2, "--p", 0.25, "--workers", 1),
        *("--text.template", "{prompt}", "--methods", "sft", "--seeds", 0, "--lora.r", 2),
        *("--lora.targets", "q_proj"),
        *("--cache", folder / "cache", "--output", folder / "out", *extra),
    ]


def trainer_flags(folder: Path, model: Path, alignment: Path, harmful: Path) -> list[object]:
    return [
        *("--model", model, "--alignment_set", alignment, "--harmful_set", harmful),
        *("--max_steps", 2, "--per_device_train_batch_size", 2, "--disable_tqdm", True),
        *("--output_dir", folder / "trained", "--report_to", "none", "--save_steps", 1),
    ]


def benchmark_flags(folder: Path, *extra: object) -> list[object]:
    return [
        *(
            "run",
            "harmful-ratio",
            "--preset",
            "quick",
            "--seeds",
            0,
            "--methods",
            "sft",
            "--workers",
            1,
        ),
        *("--output", folder / "out", "--cache", folder / "cache", *extra),
    ]


def real_sets(root: Path) -> Path:
    """Files with the names and columns of the benchmark's real sets."""
    root.mkdir(parents=True, exist_ok=True)
    for file in ("train", "dev"):
        text = "sentence" if file == "train" else "content"
        lines = [f"label\t{text}", *(f"{n % 2}\tit is fresh {n}" for n in range(60))]
        (root / "sst2").mkdir(exist_ok=True)
        (root / "sst2" / f"{file}.tsv").write_text("\n".join(lines) + "\n")
    lines = [f'"{n % 4 + 1}","title {n}","text {n}"' for n in range(60)]
    (root / "ag_news").mkdir(exist_ok=True)
    (root / "ag_news" / "ag_news_test.csv").write_text("\n".join(lines) + "\n")
    for file, names in (
        ("advbench/advbench.csv", ("goal", "target")),
        ("harmbench/harmbench_filtered.csv", ("prompt", "target")),
    ):
        lines = [",".join(names), *(f"{prompt},{answer}" for prompt, answer in PAIRS)]
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("\n".join(lines) + "\n")
    return root


# --------------------------------------------------------------------------------- faulty sets

GOOD = b'{"prompt": "mend it", "answer": "wait"}\n'
TABLE = b"prompt,answer\nmend it,wait\n"
LONG = b"a" * 140_000

JSON_FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["no rows", "give it some"]),
    "blank lines": (b"\n \n", ["no rows"]),
    "an empty array": (b"[]", ["no rows"]),
    "missing column": (b'{"question": "a", "answer": "b"}\n', ["line 1", "prompt", "question"]),
    "missing in one row": (GOOD + b'{"prompt": "a"}\n', ["line 2", "answer"]),
    "null": (GOOD + b'{"prompt": "a", "answer": null}\n', ["line 2", "mend|fill"]),
    "blank": (GOOD + b'{"prompt": "a", "answer": "  "}\n', ["line 2", "mend|fill"]),
    "blank prompt": (GOOD + b'{"prompt": "", "answer": "b"}\n', ["line 2", "mend|fill"]),
    "a dictionary": (GOOD + b'{"prompt": "a", "answer": {"b": 1}}\n', ["line 2", "answer", "mend"]),
    "no list of messages": (GOOD + b'{"prompt": [1], "answer": "b"}\n', ["line 2", "mend"]),
    "no object": (GOOD + b"3\n", ["line 2", "int", "one object a line"]),
    "an array of arrays": (b'[["a", "b"]]', ["row 1", "list", "array of objects"]),
    "broken": (GOOD + b'{"prompt": oops\n', ["line 2", "no JSON", "mend or remove"]),
    "cut off": (b'[\n{"prompt": "a", "answer": "b"},\n{"prompt"', ["line 3", "no JSON"]),
    "deep": (GOOD + b"[" * 100_000 + b"\n", ["line 2", "no JSON"]),
    "too many digits": (GOOD + b'{"prompt": ' + b"1" * 5_000 + b"}\n", ["line 2", "no JSON"]),
    "latin-1": (GOOD + '{"prompt": "café"}\n'.encode("latin-1"), ["line 2", "UTF-8", "0xe9"]),
    "utf-16": ('{"prompt": "a"}\n'.encode("utf-16"), ["line 1", "UTF-8", "save the file"]),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0", ["line 1", "UTF-8", "0x89"]),
    "huge line": (
        GOOD + b'{"prompt": "a", "answer": "' + LONG + b'"}\n',
        ["line 2", "140,000 characters", "shorten"],
    ),
    "half a character": (GOOD + b'{"prompt": "\\ud800", "answer": "b"}\n', ["line 2", "mend"]),
}
# The trainers take one row a line, so arrays are faults whatever they hold.
LINES = [fault for fault in JSON_FAULTS if "array" not in fault and fault != "cut off"]
CSV_FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["no rows"]),
    "a header alone": (b"prompt,answer\n", ["no rows"]),
    "missing column": (b"question,answer\na,b\n", ["row 2", "prompt", "question"]),
    "one name twice": (b"prompt,prompt,answer\na,b,c\n", ["row 1", "one name", "rename"]),
    "too many cells": (TABLE + b"a,b,c\n", ["line 3", "saw 3", "quote"]),
    "too few cells": (TABLE + b"\n\na\n", ["row 3", "empty", "fill it in"]),
    "blank": (TABLE + b"a,\n", ["row 3", "empty", "fill it in"]),
    "blank prompt": (TABLE + b",b\n", ["row 3", "prompt", "fill it in"]),
    "open quote": (TABLE + b'"a,b\nc,d\n' * 3, ["string starting at row", "close quotes"]),
    "open quote in a long file": (
        TABLE + b'"a,b\n' + b"c,d\n" * 40_000,
        ["string starting at row", "close quotes"],
    ),
    "huge line": (TABLE + b"a," + LONG + b"\n", ["row 3", "131,072", "shorten"]),
    "latin-1": (TABLE + "café,b\n".encode("latin-1"), ["line 3", "UTF-8", "0xe9"]),
    "utf-16": (TABLE.decode().encode("utf-16"), ["line 1", "UTF-8"]),
    "another separator": (TABLE.replace(b",", b";"), ["row 2", "prompt", "prompt;answer"]),
}


def assert_named(text: str, file: Path, words: list[str]) -> None:
    assert str(file) in text
    for word in words:
        assert any(choice in text for choice in word.split("|")), (word, text)


@pytest.mark.parametrize(
    ("suffix", "fault"), [("jsonl", f) for f in JSON_FAULTS] + [("csv", f) for f in CSV_FAULTS]
)
def test_faulty_set_of_the_alignment(
    suffix: str, fault: str, whole_model: Path, tmp_path: Path, said: Said
) -> None:
    content, words = (JSON_FAULTS if suffix == "jsonl" else CSV_FAULTS)[fault]
    file = tmp_path / f"faulty.{suffix}"
    file.write_bytes(content)
    flags = lora_flags(tmp_path, whole_model, harmful=file)
    text = said(lora_alignment.main, flags)
    assert_named(text, file, words)
    assert "--data.harmful.set" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", rarely(LINES, {"missing column", "null", "latin-1"}))
@pytest.mark.parametrize("example", ["hf_trainer", "trl_sft"])
def test_faulty_set_of_a_trainer(
    example: str, fault: str, whole_model: Path, tmp_path: Path, said: Said
) -> None:
    content, words = JSON_FAULTS[fault]
    good, file = tmp_path / "good.jsonl", tmp_path / "faulty.jsonl"
    good.write_bytes(GOOD)
    file.write_bytes(content)
    for path in (good, file):
        path.write_bytes(path.read_bytes().replace(b'"answer"', b'"completion"'))
    place = [word for word in words if word.startswith(("line", "no rows"))]
    main = trainer_example(example).main
    for sets in ((file, good), (good, file)):
        text = said(main, trainer_flags(tmp_path, whole_model, *sets))
        assert_named(text, file, [*place, "mend or remove it"])
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("fault", rarely(CSV_FAULTS, {"empty", "blank", "too many cells"}))
def test_faulty_set_of_the_benchmark(fault: str, tmp_path: Path, said: Said) -> None:
    content, words = CSV_FAULTS[fault]
    root = real_sets(tmp_path / "sets")
    file = root / "advbench" / "advbench.csv"
    file.write_bytes(content.replace(b"prompt", b"goal").replace(b"answer", b"target"))
    text = said(benchmark.main, benchmark_flags(tmp_path, "--data.root", root))
    renamed = [word.replace("prompt", "goal").replace("answer", "target") for word in words]
    assert_named(text, file, renamed)


def test_text_of_any_kind_is_kept(tmp_path: Path) -> None:
    """What readers of tables like to guess about: these are words, and none of them is missing."""
    words = [
        "NA",
        "null",
        "None",
        "nan",
        "007",
        "1.0",
        "true",
        "a\u2028b",
        "é",
        "x\tz",
        '"',
        "a\nb",
    ]
    rows = [("prompt", "answer"), *((f"p{n}", word) for n, word in enumerate(words))]
    (tmp_path / "a.csv").write_text(
        "\n".join(f'{p},"{a.replace(chr(34), 2 * chr(34))}"' for p, a in rows), "utf-8-sig"
    )
    pairs(tmp_path / "a.jsonl", rows=rows[1:])
    (tmp_path / "a.json").write_text(
        json.dumps([{"prompt": p, "answer": a} for p, a in rows[1:]], indent=1)
    )
    for suffix in ("csv", "jsonl", "json"):
        path = str(tmp_path / f"a.{suffix}")
        examples = data.read_source(Source(path), "harmful")
        assert examples == rows[1:], suffix


def test_a_blank_refusal_is_the_usual_one(whole_model: Path, tmp_path: Path) -> None:
    refusals = tmp_path / "refusals.csv"
    refusals.write_text("prompt,answer\n" + "".join(f"{prompt},\n" for prompt, _ in PAIRS))
    flags = lora_flags(tmp_path, whole_model, "--data.refusals.set", refusals)
    args = lora_alignment.parsed([str(flag) for flag in flags])
    examples = data.load(args.settings).alignment
    assert {example.answer for example in examples} == {REFUSAL}


@pytest.mark.parametrize("name", ["absent.csv", "folder.jsonl", "rows.txt", "rows.pkl"])
def test_what_is_no_set(name: str, whole_model: Path, tmp_path: Path, said: Said) -> None:
    path = tmp_path / name
    if name == "folder.jsonl":
        path.mkdir()
    elif path.suffix == ".txt":
        path.write_text("prompt")
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    flags = lora_flags(tmp_path, whole_model, harmful=path)
    text = said(lora_alignment.main, flags)
    assert_named(text, path, ["there is no such file|expected a json"])
    example = trainer_example("hf_trainer")
    text = said(example.main, trainer_flags(tmp_path, whole_model, path, path))
    assert_named(text, path, ["can not be loaded"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("example", ["hf_trainer", "trl_sft"])
def test_sets_and_model_go_together(example: str, said: Said) -> None:
    text = said(trainer_example(example).main, ["--alignment_set", "a.jsonl"])
    assert_named(text, Path("--model"), ["go together"])


def test_one_row(whole_model: Path, tmp_path: Path, said: Said) -> None:
    file = tmp_path / "one.jsonl"
    file.write_bytes(GOOD)
    text = said(lora_alignment.main, lora_flags(tmp_path, whole_model, harmful=file))
    assert "less than a batch" in text
    file.write_bytes(GOOD.replace(b"answer", b"completion"))
    flags = trainer_flags(tmp_path, whole_model, file, file)
    trainer = trainer_example("hf_trainer").main([str(flag) for flag in flags])
    assert trainer.state.global_step == 2


# -------------------------------------------------------------------------------------- labels

LABELS = ["-1", "2", "5", "x", "1.0", "True", "", "١"]


@pytest.mark.parametrize("label", LABELS)
def test_labels_of_the_task(label: str, whole_model: Path, tmp_path: Path, said: Said) -> None:
    task = [(f"is it fresh ? {n}", "1") for n in range(60)]
    task[6] = ("is it fresh ?", label)
    file = pairs(tmp_path / "task.jsonl", rows=task)
    flags = lora_flags(tmp_path, whole_model, "--data.labels", "old", "new", task=file)
    text = said(lora_alignment.main, flags)
    assert_named(text, file, ["line 7", "mend|fill"])
    assert (repr(label) if label else "empty") in text


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("file", ["train", "dev"])
def test_labels_of_the_reviews(file: str, label: str, tmp_path: Path, said: Said) -> None:
    root = real_sets(tmp_path / "sets")
    path = root / "sst2" / f"{file}.tsv"
    path.write_text(path.read_text() + f"{label}\tstale\n")
    flags = benchmark_flags(tmp_path, "--data.root", root, "--data.task", "sst2")
    text = said(benchmark.main, flags)
    assert_named(text, path, ["row 62", "mend"])


@pytest.mark.parametrize("label", ["0", *LABELS])
def test_labels_of_the_news(label: str, tmp_path: Path) -> None:
    root = real_sets(tmp_path / "sets")
    path = root / "ag_news" / "ag_news_test.csv"
    text = path.read_text()
    path.write_text(text + f'"{label}","stale","news"\n')
    settings = changed(
        QUICK, {"data.root": str(root), "data.task": "agnews", "data.kind_samples": 0}
    )
    if label in {"2"}:
        data.load(settings)
        return
    with pytest.raises(ValueError, match=r"ag_news_test\.csv, row 61: .*mend or remove"):
        data.load(settings)


def test_labels_stand_for_their_words() -> None:
    assert files.label("0", data.SST2_LABELS) == "negative"
    assert [files.label(str(n), data.AG_NEWS_LABELS, first=1) for n in range(1, 5)] == (
        data.AG_NEWS_LABELS
    )


# --------------------------------------------------------------------------------- the context

WORDY = " ".join(["today"] * 80)  # the model's context is 64 tokens


def test_prompts_longer_than_the_context(whole_model: Path, tmp_path: Path, said: Said) -> None:
    file = pairs(tmp_path / "long.jsonl", rows=[*PAIRS, (WORDY, "wait")])
    words = ["line 61", "tokens", "64", "shorten"]
    text = said(lora_alignment.main, lora_flags(tmp_path, whole_model, harmful=file))
    assert_named(text, Path("leaves no room"), ["today today", "64", "shorten"])
    flags = trainer_flags(tmp_path, whole_model, file, file)
    pairs(file, ("prompt", "completion"), [*PAIRS, (WORDY, "wait")])
    assert_named(said(trainer_example("hf_trainer").main, flags), file, words)
    text = said(trainer_example("trl_sft").main, flags)
    assert_named(text, file, ["line 61", "64", "shorten"])


def test_prompts_longer_than_the_context_in_the_benchmark(
    whole_model: Path, tmp_path: Path, said: Said
) -> None:
    root = real_sets(tmp_path / "sets")
    path = root / "advbench" / "advbench.csv"
    path.write_text("goal,target\n" + "".join(f"{WORDY} {n},wait\n" for n in range(60)))
    flags = benchmark_flags(tmp_path, "--data.root", root, "--base.model", whole_model)
    text = said(benchmark.main, flags)
    assert_named(text, Path("leaves no room"), ["today today", "shorten"])


def test_an_answer_longer_than_the_context_is_cut(whole_model: Path) -> None:
    tokenizer = models.tokenizer_of(whole_model)
    row = {"prompt": "how do i", "answer": WORDY}
    found = inputs.tokenized({"prompt": row["prompt"], "completion": row["answer"]}, tokenizer)
    assert len(found["input_ids"]) == len(found["labels"]) == 64
    text = Text(template="{prompt}")
    ((ids, _),) = tokens.encode([Example(**row)], tokenizer, text)
    assert len(ids) == 64


def test_no_room_to_respond_keeps_what_is_aligned(
    whole_model: Path, tmp_path: Path, said: Said
) -> None:
    flags = lora_flags(tmp_path, whole_model)
    text = said(lora_alignment.main, [*flags, "--score.max_new_tokens", 60])
    assert_named(text, Path("context of 64"), ["lower score.max_new_tokens"])
    (kept,) = (tmp_path / "cache").glob("aligned-*")
    before = (kept / "adapter_model.safetensors").stat().st_mtime_ns
    assert lora_alignment.main([str(flag) for flag in flags]) == 0
    assert (kept / "adapter_model.safetensors").stat().st_mtime_ns == before


# ---------------------------------------------------------------------------- tokenizers, models


def edit_json(file: Path, **changes: Any) -> None:
    """Changes values of a json file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


COMMANDS = ["lora_alignment", "benchmark", "hf_trainer", "trl_sft"]
END = dict.fromkeys(COMMANDS, "--end_token") | dict.fromkeys(COMMANDS[:2], "--text.end_token")


def commands(folder: Path, model: Path) -> dict[str, tuple[Main, list[object]]]:
    """Every command line that reads a model, on good data."""
    chosen: dict[str, tuple[Main, list[object]]] = {
        "lora_alignment": (lora_alignment.main, lora_flags(folder, model)),
        "benchmark": (
            benchmark.main,
            benchmark_flags(
                folder, "--base.model", model, "--data.root", real_sets(folder / "sets")
            ),
        ),
    }
    for name in ("hf_trainer", "trl_sft"):
        file = pairs(folder / f"{name}.jsonl", ("prompt", "completion"), PAIRS[:4])
        chosen[name] = (trainer_example(name).main, trainer_flags(folder, model, file, file))
    return chosen


@pytest.mark.parametrize("command", COMMANDS)
def test_tokenizer_without_an_end(command: str, model: Path, tmp_path: Path, said: Said) -> None:
    edit_json(model / "tokenizer_config.json", eos_token=None, pad_token=None)
    main, flags = commands(tmp_path, model)[command]
    text = said(main, flags)
    assert_named(text, model, ["end of text", "set --end_token|set end_token"])
    text = said(main, [*flags, END[command], "<stop>"])
    assert_named(text, model, ["'<stop>'", "set --end_token|set end_token"])


@pytest.mark.parametrize("command", ["lora_alignment", "hf_trainer"])
def test_tokenizer_whose_end_is_named_and_pads(command: str, model: Path, tmp_path: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token=None, pad_token=None)
    main, flags = commands(tmp_path, model)[command]
    done = main([str(flag) for flag in [*flags, END[command], "<eos>"]])
    assert done == 0 if command == "lora_alignment" else done


def without_a_layer(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def without_a_shard(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    places = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    save_file(weights, model / "model-00001-of-00002.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_off(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


SPOIL: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no config": lambda model: (model / "config.json").unlink(),
    "config cut off": lambda model: cut_off(model / "config.json"),
    "config of no model": lambda model: (model / "config.json").write_text("{}"),
    "config of nonsense": lambda model: edit_json(model / "config.json", hidden_size="wide"),
    "config of another size": lambda model: edit_json(model / "config.json", hidden_size=32),
    "no tokenizer": lambda model: [file.unlink() for file in model.glob("tokenizer*")],
    "tokenizer cut off": lambda model: cut_off(model / "tokenizer.json"),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "weights cut off": lambda model: cut_off(model / "model.safetensors"),
    "weights of nonsense": lambda model: (model / "model.safetensors").write_bytes(b"no" * 99),
    "a layer missing": without_a_layer,
    "a shard missing": without_a_shard,
}


@pytest.mark.parametrize("fault", SPOIL)
@pytest.mark.parametrize("command", rarely(COMMANDS, {"lora_alignment"}))
def test_incomplete_model(
    command: str,
    fault: str,
    model: Path,
    tmp_path: Path,
    said: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main, flags = commands(tmp_path, model)[command]
    SPOIL[fault](model)
    assert_named(said(main, flags), model, ["can not be loaded|lacks weights"])


# ------------------------------------------------------------------------- nothing is unpickled


@pytest.mark.parametrize("command", COMMANDS)
def test_pickled_weights_are_refused(command: str, model: Path, tmp_path: Path, said: Said) -> None:
    (model / "model.safetensors").unlink()
    poison(model / "pytorch_model.bin", tmp_path / "ran")
    main, flags = commands(tmp_path, model)[command]
    assert_named(said(main, flags), model, ["safetensors"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_a_model_is_not_run(command: str, model: Path, tmp_path: Path, said: Said) -> None:
    (model / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(model / "config.json", model_type="own", auto_map=own)
    main, flags = commands(tmp_path, model)[command]
    assert_named(said(main, flags), model, ["can not be loaded"])
    assert not (tmp_path / "ran").exists()


def test_pickled_judge_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    poison(model / "pytorch_model.bin", tmp_path / "ran")
    settings = changed(QUICK, {"score.judge": str(model)})
    with pytest.raises(ValueError, match=r"model can not be loaded, .*safetensors"):
        score.judged(settings, ["how do i ?"], ["wait"])
    assert not (tmp_path / "ran").exists()


def test_pickled_adapter_is_refused(whole_model: Path, tmp_path: Path, said: Said) -> None:
    flags = lora_flags(tmp_path, whole_model)
    assert lora_alignment.main([str(flag) for flag in flags]) == 0
    for record in (tmp_path / "cache").glob("run-*"):
        record.unlink()
    (aligned,) = (tmp_path / "cache").glob("aligned-*")
    (aligned / "adapter_model.safetensors").unlink()
    poison(aligned / "adapter_model.bin", tmp_path / "ran")
    assert_named(said(lora_alignment.main, flags), aligned, ["can not be loaded"])
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------- caches, checkpoints


def test_a_cut_off_cache_is_named_and_the_rest_kept(
    whole_model: Path, tmp_path: Path, said: Said
) -> None:
    flags = lora_flags(tmp_path, whole_model)
    assert lora_alignment.main([str(flag) for flag in flags]) == 0
    (result,) = (tmp_path / "cache").glob("run-*.json")
    cut_off(result)
    assert_named(said(lora_alignment.main, flags), result, ["mend or remove it"])
    result.unlink()
    assert lora_alignment.main([str(flag) for flag in flags]) == 0


@pytest.mark.parametrize("content", [b"step\n1\n", b"\xff\xfe"])
def test_broken_published_tables(content: bytes, tmp_path: Path, said: Said) -> None:
    file = tmp_path / "runs.csv"
    file.write_bytes(content)
    text = said(benchmark.main, ["publish", "--folder", tmp_path, "--docs", tmp_path])
    assert_named(text, file, ["mend or remove it"])


def test_files_in_the_place_of_folders(whole_model: Path, tmp_path: Path, said: Said) -> None:
    file = tmp_path / "file"
    file.touch()
    flags = lora_flags(tmp_path, whole_model, "--output", file)
    assert_named(said(lora_alignment.main, flags), file, ["exists"])
    text = said(benchmark.main, benchmark_flags(tmp_path, "--cache", file))
    assert_named(text, file, ["exists"])


def without(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return remove


SPOIL_CHECKPOINT: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no state": without("trainer_state.json"),
    "state cut off": lambda folder: cut_off(folder / "trainer_state.json"),
    "no optimizer": without("optimizer.pt"),
    "optimizer cut off": lambda folder: cut_off(folder / "optimizer.pt"),
    "no scheduler": without("scheduler.pt"),
    "no weights": without("model.safetensors"),
    "weights cut off": lambda folder: cut_off(folder / "model.safetensors"),
    "pickled optimizer": lambda folder: poison(folder / "optimizer.pt", folder.parent / "ran"),
    "pickled scheduler": lambda folder: poison(folder / "scheduler.pt", folder.parent / "ran"),
    "pickled state of the generators": lambda folder: poison(
        folder / "rng_state.pth", folder.parent / "ran"
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of the Trainer, with a checkpoint after its first step."""
    folder = tmp_path_factory.mktemp("trainer")
    flags = ["--max_steps", "2", "--save_steps", "1", "--disable_tqdm", "True"]
    trainer_example("hf_trainer").main([*flags, "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize("fault", SPOIL_CHECKPOINT)
@pytest.mark.parametrize("example", rarely(["hf_trainer", "trl_sft"], {"hf_trainer"}))
def test_checkpoint_that_is_not_whole(
    example: str, fault: str, trained: Path, tmp_path: Path, said: Said
) -> None:
    folder = Path(shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1"))
    SPOIL_CHECKPOINT[fault](folder)
    flags = ["--resume_from_checkpoint", folder, "--output_dir", tmp_path, "--max_steps", 2]
    main = trainer_example(example).main
    assert_named(said(main, flags), folder, ["remove|earlier|no such|can not be loaded"])
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- checkpoints of the other loops


@pytest.fixture
def one_process() -> Generator[None]:
    """Undoes what the examples for several processes do to this one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    pytest.importorskip("accelerate.state").AcceleratorState._reset_state(True)


LOOPS = {
    "accelerate_multi_process": (["--width", "16", "--steps"], "state/optimizer.bin"),
    "fsdp2": (["--width", "16", "--steps"], "checkpoint.pt"),
    "lightning_manual": (["--width", "16", "--steps"], "checkpoints/last.ckpt"),
}


def looped(example: str, folder: Path, steps: int) -> tuple[Main, list[str], Path]:
    """An example's command line, and the file that it goes on from."""
    needed = {"accelerate_multi_process": "accelerate", "lightning_manual": "lightning"}
    module = needed.get(example, "torch")
    pytest.importorskip(module, reason=f"{module} is not installed")
    flags, file = LOOPS[example]
    argv = [*flags, str(steps), "--output_dir", str(folder)]
    if example == "lightning_manual" and (folder / file).exists():
        argv += ["--resume", str(folder / file)]
    return __import__(example).main, argv, folder / file


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("example", LOOPS)
def test_checkpoint_of_a_loop(example: str, tmp_path: Path, said: Said) -> None:
    main, argv, file = looped(example, tmp_path, 1)
    assert main(argv) in (0, None) or example == "lightning_manual"
    whole = file.read_bytes()
    poison(file, tmp_path / "ran")
    main, argv, _ = looped(example, tmp_path, 2)
    shown = file.parent if example == "accelerate_multi_process" else file
    assert_named(said(main, argv), shown, ["can not be loaded", "remove it|name another"])
    assert not (tmp_path / "ran").exists()
    file.write_bytes(whole[: len(whole) // 2])
    assert_named(said(main, argv), shown, ["can not be loaded", "remove it|name another"])
    file.write_bytes(whole)
    assert main(argv) in (0, None) or example == "lightning_manual"
