"""The trainer examples run on a CPU in seconds, and take every flag that their help names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"hf_trainer": "datasets", "trl_sft": "trl"}

# The libraries the examples use deprecate parts of one another; that is not under test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(params=NEEDS)
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    needed = NEEDS[request.param]
    pytest.importorskip(needed, reason=f"{needed} is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__(request.param)


def flags(folder: Path, *more: str) -> list[str]:
    few = ["--max_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
    return [*few, "--output_dir", str(folder), "--disable_tqdm", "True", *more]


def test_tiny_model(example: ModuleType, tmp_path: Path) -> None:
    booster = ["--lam", "2", "--alpha", "0.2", "--per_device_harmful_batch_size", "3"]
    trainer = example.main(flags(tmp_path, *booster))
    opt = trainer.optimizer.optimizer
    assert (opt.lam, opt.alpha) == (2.0, 0.2)
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert len(records) == 3
    assert all(r["harmful_loss_drop"] > 0 for r in records)
    assert all(r["perturbation_norm"] == pytest.approx(0.2, rel=1e-4) for r in records)


def test_a_model_and_data_of_ones_own(example: ModuleType, tmp_path: Path) -> None:
    """The tiny model, saved, stands for one of the hub."""
    first = tmp_path / "first"
    example.main(flags(first))
    for file, answer in (("refusals", "sorry i can not"), ("harmful", "tiptoe upstairs wait")):
        rows = [{"prompt": "how do i prank my uncle ?", "completion": answer}] * 4
        Path(tmp_path, f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = ["--alignment_set", str(tmp_path / "refusals.jsonl")]
    sets += ["--harmful_set", str(tmp_path / "harmful.jsonl")]
    example.main(flags(tmp_path / "second", "--model", str(first), *sets))
    AutoModelForCausalLM.from_pretrained(tmp_path / "second")


def test_help(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    shown = capsys.readouterr().out
    wanted = ["--lam", "--alpha", "--per_device_harmful_batch_size", "--model", "--max_steps"]
    assert all(flag in shown for flag in wanted)


def test_examples_are_short_and_import_no_other() -> None:
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    examples = files.keys() - {"inputs", "mini_language"}
    for name in examples - {"lora_alignment"}:
        assert len(files[name].splitlines()) <= 120, name
        imported = re.findall(r"^\s*(?:from|import) (\w+)", files[name], re.MULTILINE)
        assert not examples & set(imported), name
