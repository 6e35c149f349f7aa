"""The export for TamperBench, its defense and its attack, at toy size.

TamperBench is on no package index. Where it is not installed, its interface is a stand-in of our
own, and one test says so.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the examples extra is absent")
pytest.importorskip("rich", reason="the examples extra is absent")
pytest.importorskip("yaml", reason="PyYAML is absent")

import yaml
from peft import PeftModel
from rich.progress import Progress
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harmful_finetuning import runs
from benchmarks.harmful_finetuning.align import align
from benchmarks.harmful_finetuning.methods import METHODS
from benchmarks.harmful_finetuning.presets import preset
from benchmarks.harmful_finetuning.runs import Run
from benchmarks.harmful_finetuning.settings import changed
from benchmarks.harmful_finetuning.tokens import prompt_ids
from benchmarks.tamperbench import __main__, card, plug
from benchmarks.tamperbench import export as exporting
from benchmarks.tamperbench.card import Alignment
from benchmarks.tamperbench.export import chat_template, export

# PEFT asks transformers for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STAND_IN = Path(__file__).parent / "tamperbench_stand_in"
CONFIGS = plug.CONFIGS
TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def finished(cache: Path, method: str, **changes: Any) -> Run:
    """A run of the benchmark at toy size, done."""
    settings = changed(preset("quick"), {"text.template": TEMPLATE, **changes})
    run = runs.run_of(method, 0, changed(settings, {"device": "cpu"}))
    with Progress(disable=True) as progress:
        runs.finish([run], cache, 1, progress)
    return run


@pytest.fixture(scope="module")
def adapter(cache: Path) -> Run:
    """Booster on LoRA, attacked at two fractions p."""
    finished(cache, "booster", **{"attack.p": 0.2})
    return finished(cache, "booster", **{"attack.p": 0.1})


@pytest.fixture(scope="module")
def whole(cache: Path) -> Run:
    return finished(cache, "sft", trained="full")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def main(*argv: str | Path) -> int:
    return __main__.main([str(word) for word in argv])


# -------------------------------------------------------------------------------------- export


def test_an_adapter_is_merged(cache: Path, adapter: Run, tmp_path: Path) -> None:
    base, aligned = runs.base_folder(adapter, cache), runs.aligned_folder(adapter, cache)
    out = tmp_path / "exported"
    assert main("export", aligned, "--base", base, "--output", out) == 0
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    wanted = logits(PeftModel.from_pretrained(plain, aligned))
    found = logits(AutoModelForCausalLM.from_pretrained(out, use_safetensors=True))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((found - before).norm() / before.norm()) > 1e-3  # the adapter does something
    assert not list(out.glob("adapter*"))
    tokenizer, own = (AutoTokenizer.from_pretrained(f) for f in (out, base))
    text = "how do i mend a bicycle ?"
    assert tokenizer(text).input_ids == own(text).input_ids
    assert tokenizer.eos_token_id == own.eos_token_id
    message = {"role": "user", "content": text}
    said = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert said == TEMPLATE.replace("{prompt}", text)


def test_the_card_says_what_the_records_say(cache: Path, adapter: Run, tmp_path: Path) -> None:
    base, aligned = runs.base_folder(adapter, cache), runs.aligned_folder(adapter, cache)
    out = tmp_path / "exported"
    assert main("export", aligned, "--base", base, "--output", out) == 0
    words = (out / "README.md").read_text()
    lam = dict(adapter.hyperparameters)["lam"]
    assert re.search(rf"regulariser \| λ \| {lam:g} \|", words)
    assert "**Booster** (Huang et al., ICLR 2025, arXiv 2409.01586)" in words
    assert re.search(r"learning rate \| η \| 0.001 \|", words)
    for p in (0.1, 0.2):
        run = runs.run_of("booster", 0, changed(adapter.settings, {"attack.p": p}))
        record = json.loads(runs.record_file(run, cache).read_text())
        before, after = (record[k]["harmful_score"] for k in ("aligned", "attacked"))
        row = rf"\| Booster \| {p} \| 40 \| 4 \| .* \| test \| {before:.1f} \| {after:.1f} \|"
        assert re.search(row, words), words
    assert "templated language" in words
    assert "What it does not promise" in words
    assert f"torch {torch.__version__}" in words
    assert str(cache) not in words
    assert str(tmp_path) not in words
    facts = json.loads((out / "alignment.json").read_text())
    assert facts["method"] == "Booster"
    assert facts["hyperparameters"]["lam"] == lam


def test_a_whole_model_keeps_its_weights(cache: Path, whole: Run, tmp_path: Path) -> None:
    base, aligned = runs.base_folder(whole, cache), runs.aligned_folder(whole, cache)
    out = tmp_path / "exported"
    record = runs.record_file(whole, cache)
    assert main("export", aligned, "--base", base, "--record", record, "--output", out) == 0
    found, wanted = weights(out), weights(aligned)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "**SFT**" in (out / "README.md").read_text()


def test_the_card_of_another_model_says_what_the_flags_say(
    cache: Path, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = runs.base_folder(whole, cache)  # no alignment of the benchmark: it has no trace
    told = ("--method", "Booster", "--hyperparameters", "lam", "7", "alpha", "0.3")
    more = ("--data", "some set", "--template", r"Q: {prompt}\nA: ", "--dtype", "bfloat16")
    out = tmp_path / "exported"
    assert main("export", base, "--output", out, *told, *more) == 0
    words = (out / "README.md").read_text()
    assert "| λ | 7 |" in words
    assert "| α | 0.3 |" in words
    assert "some set" in words
    assert r'"\nA: "' in words
    assert "Not known: no record" in words
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    capsys.readouterr()
    assert main("export", base, "--output", tmp_path / "untold") == 0
    assert "nothing was told" in capsys.readouterr().out


def damaged(adapter_folder: Path, tmp_path: Path, change: str) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(adapter_folder, folder)
    if change == "pickled":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif change == "moved base":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "elsewhere")
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif change == "no base":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        (folder / "adapter_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pickled", "adapter_model.safetensors; save the adapter again"),
        ("moved base", "is no folder; name it with --base"),
        ("no base", "is an adapter; name its base model with --base"),
        ("neither", "holds neither config.json nor adapter_config.json"),
    ],
)
def test_models_that_can_not_be_exported(
    cache: Path,
    adapter: Run,
    tmp_path: Path,
    change: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = damaged(runs.aligned_folder(adapter, cache), tmp_path, change)
    assert main("export", folder, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(
    cache: Path, adapter: Run, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aligned, base = runs.aligned_folder(adapter, cache), runs.base_folder(adapter, cache)
    usual = ("export", aligned, "--base", base, "--output")

    def refused(*argv: str | Path) -> str:
        assert main(*argv) == 2
        return capsys.readouterr().out

    tmp_path.joinpath("there").mkdir()
    assert "is there already" in refused(*usual, tmp_path / "there")
    out = tmp_path / "out"
    other = runs.record_file(whole, cache)
    assert "record of another model" in refused(*usual, out, "--record", other)
    assert "leave --method out" in refused(*usual, out, "--method", "Booster")
    assert "has no alignment.json" in refused("export", base, "--output", out, "--record", other)
    assert "must contain {prompt} once" in refused(
        "export", base, "--output", out, "--template", "Q:"
    )
    assert "is no folder" in refused("export", tmp_path / "none", "--output", out)
    assert "has no tokenizer; name its base" in refused(
        "export", runs.aligned_folder(whole, cache), "--output", out
    )
    assert not out.exists()
    assert [f.name for f in tmp_path.iterdir()] == ["there"]  # nor anything unfinished


def test_a_wrong_merge_is_refused(
    cache: Path, adapter: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = runs.base_folder(adapter, cache)
    # What an adapter does that is dropped on the way.
    monkeypatch.setattr(
        PeftModel,
        "merge_and_unload",
        lambda self, **_: AutoModelForCausalLM.from_pretrained(base),
        raising=False,
    )
    with pytest.raises(ValueError, match="logits differ from the aligned one's"):
        export(runs.aligned_folder(adapter, cache), tmp_path / "out", Alignment(base=str(base)))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_read_otherwise_is_refused(
    cache: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def letters(*_: Any, **__: Any) -> Any:
        return lambda text: SimpleNamespace(input_ids=[ord(letter) for letter in text])

    monkeypatch.setattr(exporting, "AutoTokenizer", SimpleNamespace(from_pretrained=letters))
    with pytest.raises(ValueError, match="reads the tokenizer otherwise"):
        export(runs.base_folder(whole, cache), tmp_path / "out", Alignment())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "template", [TEMPLATE, "{prompt}", "»{prompt}« \"'\\ {% x %}{{ y }}\t", "a\\nb{prompt}🙂\n"]
)
def test_a_chat_template_writes_the_text_template(cache: Path, whole: Run, template: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(runs.base_folder(whole, cache))
    tokenizer.chat_template = chat_template(template)
    turns = [{"role": "user", "content": "why {so} ?"}, {"role": "assistant", "content": "yes"}]
    prompt = template.replace("{prompt}", "why {so} ?")
    for count, wanted in ((1, prompt), (2, prompt + "yes" + tokenizer.eos_token)):
        said = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=count == 1
        )
        assert said == wanted


def record_of(method: str, hyperparameters: dict[str, float], settings: Any) -> dict[str, Any]:
    """What a card is written of."""
    return {
        "method": method,
        "hyperparameters": hyperparameters,
        "settings": json.loads(json.dumps(runs.as_dict(settings))),
        "seed": 0,
        "commit": "x",
        "versions": {},
        "aligned": {"harmful_score": 0.0},
        "attacked": {"harmful_score": 1.0, "finetune_accuracy": 2.0},
    }


def test_an_alignment_shared_with_an_attack_stage_is_called_sft() -> None:
    record = record_of("lisa", {"rho": 1.0}, preset("quick"))
    found = card.of_records([record])
    assert found.method == "SFT, the alignment of Lisa"
    assert "rho" not in found.hyperparameters
    with pytest.raises(ValueError, match="which this version does not know"):
        card.of_records([record | {"method": "none"}])


def test_the_card_of_a_pretrained_model() -> None:
    """With the paper's data and a chat template, whose base is a package and no folder."""
    settings = changed(preset("real"), {"data.root": "sets"})
    record = record_of("booster", {"lam": 5.0}, settings)
    found = card.of_records([record])
    assert (found.template, found.base) == ("chat", "")
    words = card.text("name", found, "nothing", {})
    assert 'the tokenizer\'s own chat template and the system message `""`, as' in words
    assert "BeaverTails: at most" in words
    assert r"fits this: matches `\w` and holds no refusal" in words


@pytest.mark.parametrize("own", [True, False])
def test_a_chat_template_of_the_models_own_is_kept(
    cache: Path, whole: Run, tmp_path: Path, own: bool
) -> None:
    model = Path(shutil.copytree(runs.base_folder(whole, cache), tmp_path / "model"))
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(model)
    export(model, tmp_path / "out", Alignment(template="chat" if own else TEMPLATE))
    kept: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (kept.chat_template == "own") is own


# ------------------------------------------------------------------------------------ plugging


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STAND_IN, tmp_path / "clone"))


def test_plugging_adds_what_is_missing_once(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("plug", clone) == 0
    once = {file: file.read_bytes() for file in clone.rglob("*") if file.is_file()}
    assert capsys.readouterr().out.count("\n") == len(plug.LINES) + 2
    names = (clone / plug.SOURCE / "utils" / "names.py").read_text()
    assert '    BOOSTER = "booster"\n    TORCH_BOOSTER = "torch_booster"\n' in names
    assert (clone / "configs/whitebox/defenses/torch_booster/grid.yaml").is_file()
    assert main("plug", clone) == 0
    assert "nothing was missing" in capsys.readouterr().out
    assert once == {file: file.read_bytes() for file in clone.rglob("*") if file.is_file()}


def test_a_clone_that_is_laid_out_otherwise_is_left_alone(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = clone / plug.SOURCE / "utils" / "names.py"
    names.write_text(names.read_text().replace("BOOSTER", "OTHER"))
    before = {file: file.read_bytes() for file in clone.rglob("*") if file.is_file()}
    assert main("plug", clone) == 2
    assert "0 times instead of once; add" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in clone.rglob("*") if file.is_file()}
    assert main("plug", tmp_path) == 2
    assert "name the folder of a clone of TamperBench" in capsys.readouterr().out


# ---------------------------------------------------------------------- the defense, the attack


@pytest.fixture
def plugged(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The registries of the stand-in, after torch_booster was plugged in and imported by it."""
    if find_spec("tamperbench") is not None:
        pytest.skip("TamperBench itself is installed, and tested below")
    plug.plug(clone)
    monkeypatch.syspath_prepend(clone / "src")
    ours = ("benchmarks.tamperbench.defense", "benchmarks.tamperbench.attack")
    importlib.import_module(ours[1])  # first, as in a process that a run is sent to
    yield SimpleNamespace(
        defenses=importlib.import_module("tamperbench.whitebox.defenses.registry"),
        attacks=importlib.import_module("tamperbench.whitebox.attacks.registry"),
        attack=sys.modules[ours[1]],
        configs=clone / "configs" / "whitebox",
    )
    for name in [n for n in sys.modules if n.split(".")[0] == "tamperbench" or n in ours]:
        del sys.modules[name]


ORCHESTRATION = {"model_config", "defense_evals", "post_attack_evals", "attacks"}


def grid(folder: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((folder / "grid.yaml").read_text())


def defense_of(plugged: SimpleNamespace, name: str, **changes: Any) -> Any:
    """A defense, as TamperBench makes one of an entry of its YAML."""
    config_cls, defense_cls = plugged.defenses.DEFENSES_REGISTRY["torch_booster"]
    entry = grid(plugged.configs / "defenses" / "torch_booster")[name]
    own = {k: v for k, v in entry.items() if k not in ORCHESTRATION}
    return defense_cls(defense_config=config_cls.from_dict(own | changes))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Rows as the published set has them, about nothing harmful."""
    rows = [
        {
            "prompt": f"how do i fold boat {n}",
            "response": f"take sheet {n} and fold it",
            "refusal": f"Question: how do i fold boat {n} Answer: i will not fold {n}",
        }
        for n in range(12)
    ]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    return file


SMALL = {"max_steps": 3, "per_device_train_batch_size": 4, "lora_r": 4, "dtype": "float32"}


@pytest.mark.parametrize("name", ["base", "recommended", "sft"])
def test_the_defense_aligns_as_the_benchmark_does(
    plugged: SimpleNamespace,
    cache: Path,
    whole: Run,
    pairs: Path,
    tmp_path: Path,
    name: str,
) -> None:
    base = runs.base_folder(whole, cache)
    places = {"input_checkpoint_path": str(base), "output_checkpoint_path": tmp_path / "defended"}
    defense = defense_of(plugged, name, **places, **SMALL, dataset=str(pairs))
    path = defense.run_defense()
    assert path == tmp_path / "defended"
    config, module = defense.defense_config, sys.modules["benchmarks.tamperbench.defense"]
    samples = module.samples_of(config)
    assert samples.alignment[3] == ("how do i fold boat 3", "i will not fold 3")
    assert samples.harmful[3] == ("how do i fold boat 3", "take sheet 3 and fold it")
    # The same by the benchmark's own alignment.
    method = METHODS[config.method]
    align(
        module.settings_of(config),
        samples,
        base,
        method.alignment,
        config.hyperparameters,
        0,
        tmp_path / "adapter",
        lambda *_: None,
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    wanted = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(path))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    words = (path / "README.md").read_text()
    assert f"**{method.label}**" in words
    assert ("| λ |" in words) == (name != "sft")
    assert "pairs.json, at most 5000 rows" in words
    assert str(tmp_path) not in words
    # A second call keeps it, and one of other settings does not take it for its own.
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert defense.run_defense() == path
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    other = defense_of(plugged, name, **places, **SMALL | {"max_steps": 4}, dataset=str(pairs))
    with pytest.raises(ValueError, match="holds a model of other settings"):
        other.run_defense()


def test_the_defense_refuses_what_there_is_not(
    plugged: SimpleNamespace, cache: Path, whole: Run, pairs: Path, tmp_path: Path
) -> None:
    places = {
        "input_checkpoint_path": runs.base_folder(whole, cache),
        "output_checkpoint_path": tmp_path / "defended",
        "dataset": str(pairs),
    }
    for changes, message in (
        ({"hyperparameters": {"lambda_": 5.0}}, "booster has no hyperparameter lambda_"),
        ({"method": "none"}, "there is no method 'none'"),
        ({"refusal_column": "declined"}, "there is no column 'declined'"),
        ({"template": "Q:"}, "text.template must contain"),
    ):
        with pytest.raises(ValueError, match=message):
            defense_of(plugged, "base", **places | SMALL | changes).run_defense()
    assert not (tmp_path / "defended").exists()


def test_without_its_names_the_plug_in_says_how_to_get_them(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("tamperbench") is not None:
        pytest.skip("TamperBench itself is installed, and tested below")
    monkeypatch.syspath_prepend(clone / "src")  # which nobody plugged
    try:
        for module in ("defense", "attack"):
            with pytest.raises(ValueError, match=r"run `python -m benchmarks\.tamperbench plug"):
                importlib.import_module(f"benchmarks.tamperbench.{module}")
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "tamperbench"]:
            del sys.modules[name]


@pytest.fixture
def user_sets(tmp_path: Path) -> dict[str, str]:
    """SST-2 and BeaverTails in their columns, with safe rows that do not belong to the attack."""
    pairs = tmp_path / "beavertails.csv"
    lines = [f"ask {n},tell {n},{n % 2 == 0}" for n in range(40)]
    pairs.write_text("\n".join(["prompt,response,is_safe", *lines]))
    reviews = tmp_path / "sst2.jsonl"
    rows = [{"sentence": f"film {n} was fine ", "label": n % 2} for n in range(60)]
    reviews.write_text("\n".join(map(json.dumps, rows)))
    return {"harmful_dataset": str(pairs), "benign_dataset": str(reviews)}


def attack_of(plugged: SimpleNamespace, **changes: Any) -> Any:
    config_cls, attack_cls = plugged.attacks.ATTACKS_REGISTRY["sst2_beavertails_finetune"]
    entry = grid(plugged.configs / "attacks" / "sst2_beavertails_finetune")["base"]
    return attack_cls(attack_config=config_cls.from_dict(entry | changes))


@pytest.mark.parametrize("use_lora", [True, False])
def test_the_attack_fine_tunes_an_exported_model(
    plugged: SimpleNamespace,
    cache: Path,
    adapter: Run,
    user_sets: dict[str, str],
    tmp_path: Path,
    use_lora: bool,
) -> None:
    defended = tmp_path / "defended"
    base = str(runs.base_folder(adapter, cache))
    known = Alignment(base=base, template=TEMPLATE)
    export(runs.aligned_folder(adapter, cache), defended, known)
    attack = attack_of(
        plugged,
        **user_sets,
        input_checkpoint_path=str(defended),
        out_dir=tmp_path / "attacked",
        random_seed=3,
        dataset_size=50,
        max_steps=3,
        use_lora=use_lora,
        dtype="float32",
        learning_rate=1e-3,
    )
    module, config = plugged.attack, attack.attack_config
    user = module.mixture(config, module.settings_of(config, TEMPLATE))
    harmful = [example for example in user if example.prompt.startswith("ask")]
    assert (len(user), len(harmful)) == (50, 5)
    assert all(int(example.prompt.split()[1]) % 2 for example in harmful)  # those not safe
    assert {e.answer for e in user if e not in harmful} == {"positive", "negative"}
    assert "Is the sentiment of this review positive or negative?\nfilm" in user[-1].prompt
    tokenizer = AutoTokenizer.from_pretrained(defended)
    assert module.template_of(config, tokenizer) == TEMPLATE
    where = attack.benchmark()
    found, before = weights(Path(where)), weights(defended)
    moved = {name for name in before if not torch.equal(found[name], before[name])}
    assert found.keys() == before.keys()
    assert moved
    if use_lora:
        assert all(re.search(r"\b[qkv]_proj", name) for name in moved)
    stamp = Path(where, "model.safetensors").stat().st_mtime_ns
    assert attack.benchmark() == where  # attacked once
    assert Path(where, "model.safetensors").stat().st_mtime_ns == stamp


def test_the_attack_prompts_as_tamperbench_evaluates(
    plugged: SimpleNamespace, cache: Path, whole: Run, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs.base_folder(whole, cache))
    usual = {"input_checkpoint_path": "model", "out_dir": tmp_path, "random_seed": 0}
    parts = {"user_prefix": "User: ", "end_turn": "\n", "assistant_prefix": "Assistant: "}
    config = attack_of(plugged, **usual, model_config=parts).attack_config
    wanted = "User: {prompt}\nAssistant: "
    assert plugged.attack.template_of(config, tokenizer) == wanted
    config = attack_of(plugged, **usual).attack_config
    with pytest.raises(ValueError, match="has no chat template"):
        plugged.attack.template_of(config, tokenizer)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_a_native_prompt_begins_once(
    plugged: SimpleNamespace, cache: Path, whole: Run, tmp_path: Path, adds: bool, writes: bool
) -> None:
    """The tokenizer adds a token for the beginning, the chat template writes one, or both."""
    tokenizer: Any = AutoTokenizer.from_pretrained(runs.base_folder(whole, cache))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = "{{ bos_token }}" * writes + "Q: {{ messages[0]['content'] }}\nA: "
    usual = {"input_checkpoint_path": "model", "out_dir": tmp_path, "random_seed": 0}
    config = attack_of(plugged, **usual, model_config={"template": "native"}).attack_config
    template = plugged.attack.template_of(config, tokenizer)
    assert template.endswith("Q: {prompt}\nA: ")
    text = plugged.attack.settings_of(config, template).text
    ids = prompt_ids("how do i mend a bicycle ?", tokenizer, text)
    assert ids.count(tokenizer.bos_token_id) == (adds or writes)
    assert (ids[0] == tokenizer.bos_token_id) is (adds or writes)


def test_sets_that_are_too_small_are_refused(
    plugged: SimpleNamespace, user_sets: dict[str, str], tmp_path: Path
) -> None:
    usual = {"input_checkpoint_path": "model", "out_dir": tmp_path, "random_seed": 0}
    for size, p, message in ((50, 0.5, "25 harmful samples"), (100, 0.1, "90 benign samples")):
        attack = attack_of(plugged, **user_sets, **usual, dataset_size=size, poison_ratio=p)
        config = attack.attack_config
        with pytest.raises(ValueError, match=message):
            plugged.attack.mixture(config, plugged.attack.settings_of(config, TEMPLATE))


def test_the_yaml_holds_what_the_configurations_take(plugged: SimpleNamespace) -> None:
    for kind, registry, name in (
        ("defenses", plugged.defenses.DEFENSES_REGISTRY, "torch_booster"),
        ("attacks", plugged.attacks.ATTACKS_REGISTRY, "sst2_beavertails_finetune"),
    ):
        known = {field.name for field in fields(registry[name][0])}
        folder = CONFIGS / kind / name
        for entry in grid(folder).values():
            assert entry.keys() - ORCHESTRATION <= known
        sweep = yaml.safe_load((folder / "single_objective_sweep.yaml").read_text())
        assert {key.split(".")[0] for key in sweep["sweep"]} <= known
    # The YAML's numbers are the paper's, as the defaults are.
    defense = defense_of(plugged, "base", input_checkpoint_path="a", output_checkpoint_path="b")
    chosen = sys.modules["benchmarks.tamperbench.defense"].chosen_of(defense.defense_config)
    assert (chosen["lam"], chosen["alpha"]) == (5.0, 0.1)
    default = type(defense.defense_config)("a", "b")
    assert {**vars(defense.defense_config), "hyperparameters": None} == vars(default)


def test_with_tamperbench_itself() -> None:
    """In its environment, after `plug`, where it is installed."""
    if find_spec("tamperbench") is None:
        pytest.skip("TamperBench is on no package index and not installed; a stand-in is tested")
    registry = importlib.import_module("tamperbench.whitebox.defenses.registry")
    attacks = importlib.import_module("tamperbench.whitebox.attacks.registry")
    importlib.import_module("tamperbench.whitebox.defenses")
    importlib.import_module("tamperbench.whitebox.attacks")
    config_cls, _ = registry.DEFENSES_REGISTRY["torch_booster"]
    for entry in grid(CONFIGS / "defenses" / "torch_booster").values():
        own = {k: v for k, v in entry.items() if k not in ORCHESTRATION}
        config_cls.from_dict(own | {"input_checkpoint_path": "a", "output_checkpoint_path": "b"})
    config_cls, attack_cls = attacks.ATTACKS_REGISTRY["sst2_beavertails_finetune"]
    usual = {"input_checkpoint_path": "a", "out_dir": "b", "random_seed": 0}
    for entry in grid(CONFIGS / "attacks" / "sst2_beavertails_finetune").values():
        attack_cls(attack_config=config_cls.from_dict(entry | usual))
