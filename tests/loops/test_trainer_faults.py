"""What once failed silently or without naming its cause in Trainer, TRL, Accelerate, Lightning."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend

from tests.loops.test_transformers import (
    ALPHA,
    COMMON,
    LAM,
    VOCABULARY,
    Recorder,
    Stream,
    arguments,
    assert_close,
    assert_equal_runs,
    collate,
    expected,
    make_trainer,
    sentences,
    texts,
    tiny_llama,
    trl_renames,
    word_tokenizer,
)
from torch_booster import BoosterOptimizer
from torch_booster.integrations import needs
from torch_booster.integrations.accelerate import booster_of, regularize
from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin, BoosterTrainer
from torch_booster.signals import handlers_wait

ARGUMENTS = BoosterArguments(LAM, ALPHA, 3, self_check=False)


class Each(TrainerCallback):
    """Calls a function before each step."""

    def __init__(self, run: Callable[[int], Any]) -> None:
        self.run = run

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run(state.global_step)


def recorded(trainer: Any, resume: str | None = None) -> Recorder:
    recorder = Recorder(trainer.model)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=resume)
    return recorder


def check_lams(recorder: Recorder, lams: list[float]) -> None:
    for step, lam in zip(recorder.steps, lams, strict=True):
        if lam == 0.0:
            assert len(step.passes) == 1
            continue
        alignment, harmful = step.split()
        wanted = expected(recorder, step.weights, alignment, [harmful], lam=lam)
        assert_close(step.grads, wanted)


# ---------------------------------------------------------------------- T1: every trainer class


class Witness(TrainerCallback):
    """Holds each step's gradient against the formula over the trainer's own loss."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.loss = trainer, trainer.compute_loss
        self.calls: list[tuple[bool, Any, Any]] = []
        self.compared = 0
        trainer.compute_loss = self.compute_loss
        trainer.add_callback(self)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            tokens = kwargs.get("num_items_in_batch")
            self.calls.append((self.trainer.in_harmful_pass, copy.deepcopy(inputs), tokens))
        return self.loss(model, inputs, *args, **kwargs)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.calls = []

    def gradient(self, calls: list[Any], accumulation: int) -> list[Tensor]:
        trainer, total = self.trainer, [torch.zeros_like(p) for p in self.params]
        for _, inputs, tokens in calls:
            loss = self.loss(trainer.model, copy.deepcopy(inputs), num_items_in_batch=tokens)
            if not (trainer.model_accepts_loss_kwargs and tokens is not None):
                loss = loss / accumulation
            grads = torch.autograd.grad(loss, self.params, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        return total

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        calls = self.calls
        alignment = [call for call in calls if not call[0]]
        harmful = [call for call in calls if call[0]]
        assert (len(alignment), len(harmful)) == (2, 2)
        self.params = [p for p in self.trainer.model.parameters() if p.requires_grad]
        stepped = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        with torch.enable_grad():
            f = self.gradient(alignment, 2)
            h = self.gradient(harmful[:1], 1)
        length = torch.cat([g.flatten() for g in h]).norm()
        w = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, g in zip(self.params, h, strict=True):
                p.sub_(g, alpha=float(ALPHA / (length + 1e-7)))
        with torch.enable_grad():
            h_prime = self.gradient(harmful[:1], 1)
        with torch.no_grad():
            for p, w_p in zip(self.params, w, strict=True):
                p.copy_(w_p)
        wanted = [x + LAM * (g - q) for x, g, q in zip(f, h, h_prime, strict=True)]
        assert max(float((g - q).abs().max()) for g, q in zip(h, h_prime, strict=True)) > 1e-4
        for grad, formula in zip(stepped, wanted, strict=True):
            torch.testing.assert_close(grad, formula, rtol=1e-4, atol=2e-6)
        self.compared += 1


def chatting_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %} {{ m['content'] }} <eos>{% endfor %}"
    return tokenizer


def conversations(size: int, seed: int) -> Any:
    rows = texts(size, seed, "prompt", "completion")
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in rows
        ]
    )


def labelled(size: int, seed: int) -> Any:
    rows = texts(size, seed, "prompt", "completion")
    return rows.add_column("label", [i % 2 == 0 for i in range(size)])


def trl_class(name: str) -> tuple[Any, Any]:
    """A trainer of TRL's and its configuration; experimental ones by their module's name."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    if "." not in name:
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    folder, _, name = name.rpartition(".")
    module = __import__(f"trl.experimental.{folder}", fromlist=["_"])
    config = f"{name}Config"
    return getattr(module, f"{name}Trainer"), getattr(module, config, None) or getattr(trl, config)


def boosted(plain: type) -> type:
    return type("Boosted", (BoosterMixin, plain), {})


def scorer() -> Any:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(
        tiny_llama(dropout=0.0, num_labels=1, pad_token_id=0).config
    )


PAIRS = ("prompt", "chosen", "rejected")
# name -> the data, the settings, the trainer's arguments beside the usual ones
SERVED: dict[
    str, tuple[Callable[[int, int], Any], dict[str, Any], Callable[[], dict[str, Any]]]
] = {
    "SFT": (lambda n, s: texts(n, s, "prompt", "completion"), {}, dict),
    "DPO": (
        lambda n, s: texts(n, s, *PAIRS),
        {},
        lambda: {"ref_model": tiny_llama(1, 0.0)},
    ),
    "bema_for_ref_model.DPO": (
        lambda n, s: texts(n, s, *PAIRS),
        {},
        lambda: {"ref_model": tiny_llama(1, 0.0)},
    ),
    "KTO": (
        labelled,
        {"loss_type": "apo_zero_unpaired"},
        lambda: {"ref_model": tiny_llama(1, 0.0)},
    ),
    "Reward": (lambda n, s: texts(n, s, *PAIRS[1:]), {}, lambda: {"model": scorer()}),
    "tpo.TPO": (lambda n, s: texts(n, s, *PAIRS, "reference"), {}, dict),
    "gkd.GKD": (
        conversations,
        {"lmbda": 0.0, "max_length": 64},
        lambda: {
            "teacher_model": tiny_llama(1, 0.0),
            "processing_class": chatting_tokenizer(),
        },
    ),
    "cpo.CPO": (lambda n, s: texts(n, s, *PAIRS), {"max_length": 64}, dict),
    "orpo.ORPO": (lambda n, s: texts(n, s, *PAIRS), {"max_length": 64}, dict),
}


def served(name: str, folder: Path, booster: bool = True, **changes: Any) -> Any:
    data, settings, more = SERVED[name]
    plain, config = trl_class(name)
    common = {**COMMON, "gradient_accumulation_steps": 2, "max_steps": 2, **settings, **changes}
    common |= {"gradient_checkpointing": False, "bf16": False}
    given = {
        "model": tiny_llama(dropout=0.0, pad_token_id=0),
        "processing_class": word_tokenizer(),
        **more(),
    }
    harmful = data(7, 2)
    if booster and name in ("cpo.CPO", "orpo.ORPO"):  # which prepare a training set in __init__
        harmful = plain(
            args=config(str(folder), **common), train_dataset=harmful, **given
        ).train_dataset
    mine = {"harmful_dataset": harmful, "booster_args": copy.copy(ARGUMENTS)}
    return (boosted(plain) if booster else plain)(
        args=config(str(folder), **common),
        train_dataset=data(22, 1),
        **given,
        **(mine if booster else {}),
    )


@pytest.fixture(autouse=True)
def _no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@trl_renames
@pytest.mark.filterwarnings("ignore:At step 1 the alignment blows up")  # two steps of nonsense
@pytest.mark.parametrize("name", SERVED)
def test_trl_trainer_steps_on_the_formula(name: str, tmp_path: Path) -> None:
    trainer = served(name, tmp_path)
    witness = Witness(trainer)
    trainer.train()
    assert witness.compared == 2


@trl_renames
@pytest.mark.parametrize("name", ["cpo.CPO", "orpo.ORPO"])
def test_records_are_of_the_alignment_passes(name: str, tmp_path: Path) -> None:
    """These two keep them under another name than their fellows."""
    runs = [served(name, tmp_path, booster) for booster in (True, False)]
    for trainer in runs:
        torch.manual_seed(0)
        trainer.train()
    mine, plain = ([r["rewards/chosen"] for r in t.state.log_history if "loss" in r] for t in runs)
    assert mine[0] == pytest.approx(plain[0], rel=1e-6)


def test_seq2seq_trainer_is_the_trainer(tmp_path: Path) -> None:
    trainer = boosted(Seq2SeqTrainer)(
        model=tiny_llama(dropout=0.0),
        args=Seq2SeqTrainingArguments(
            str(tmp_path), **{**COMMON, "gradient_accumulation_steps": 2, "max_steps": 2}
        ),
        train_dataset=sentences(22, 1),
        data_collator=collate,
        harmful_dataset=sentences(7, 2),
        booster_args=copy.copy(ARGUMENTS),
    )
    witness = Witness(trainer)
    trainer.train()
    assert witness.compared == 2


REFUSED = (
    *("GRPO", "RLOO", "Distillation", "gmpo.GMPO", "a2po.A2PO", "online_dpo.OnlineDPO"),
    *("gold.GOLD", "iw_opd.IWOPD", "sdft.SDFT", "sdpo.SDPO", "distillation.Distillation"),
    *("server_distillation.ServerDistillation", "async_grpo.AsyncGRPO"),
    "async_distillation.AsyncDistillation",
)


@pytest.mark.parametrize("name", REFUSED)
def test_trainers_that_generate_are_refused_by_name(name: str) -> None:
    plain, _ = trl_class(name)
    with pytest.raises(TypeError, match=f"cannot serve {name.rpartition('.')[2]}Trainer, which"):
        boosted(plain)(harmful_dataset=sentences(3, 2))


def test_no_trainer_of_trl_is_left_out() -> None:
    """Each class is in one of the two lists, and its page says which."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent
    names = {
        line.split("class ")[1].split("(")[0]
        for file in folder.rglob("*trainer.py")
        for line in file.read_text().splitlines()
        if line.startswith("class ") and "Trainer(" in line
    } - {"_BaseTrainer"}
    listed = {f"{name.rpartition('.')[2]}Trainer" for name in (*SERVED, *REFUSED)}
    assert {name for name in names if not name.startswith("_")} <= listed
    page = (Path(__file__).parents[2] / "docs/loops/trainers-table.md").read_text()
    assert all(f"`{name}`" in page for name in listed)


@trl_renames
def test_on_policy_distillation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Set lmbda=0\.0"):
        served("gkd.GKD", tmp_path, lmbda=0.5)


@trl_renames
def test_kto_with_its_kl_term_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type='apo_zero_unpaired'"):
        served("KTO", tmp_path, loss_type="kto", train_sampling_strategy="sequential")


@trl_renames
@pytest.mark.parametrize("name", ["cpo.CPO", "orpo.ORPO"])
def test_a_trainer_that_prepares_alone_says_what_to_give(name: str, tmp_path: Path) -> None:
    plain, config = trl_class(name)
    with pytest.raises(ValueError, match=r"harmful_dataset=ThatTrainer"):
        boosted(plain)(
            model=tiny_llama(dropout=0.0, pad_token_id=0),
            args=config(str(tmp_path), **COMMON, bf16=False, max_length=64),
            train_dataset=texts(8, 1, *PAIRS),
            processing_class=word_tokenizer(),
            harmful_dataset=texts(8, 2, *PAIRS),
        )


# ---------------------------------------------------------------------- T2, T3, T13: in force


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lam": 1.5}, r"lam=1\.5 \(3\.0\)"),
        ({"lam": 0.0}, r"lam=0\.0 \(3\.0\)"),
        ({"alpha": 0.3}, r"alpha=0\.3 \(0\.1\)"),
        ({"every": 2}, r"every=2 \(1\)"),
        ({"lam_warmup_steps": 8}, r"lam_warmup_steps=8 \(0\)"),
        ({"lam_delay_steps": 5}, r"lam_delay_steps=5 \(0\)"),
        ({"norm": "tensor"}, r"norm=tensor \(global\)"),
        ({"trust_region": True}, r"trust_region=True \(False\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_resumed_run_takes_its_own_values_and_says_so(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    def make(**changes: Any) -> Any:
        booster = BoosterArguments(**{**vars(ARGUMENTS), **changes})
        return make_trainer(
            tmp_path, booster=booster, max_steps=6, save_strategy="steps", save_steps=3
        )

    make().train()
    resumed = make(**changed)
    with pytest.warns(UserWarning, match=told):
        recorder = recorded(resumed, str(tmp_path / "checkpoint-3"))
    booster = booster_of(resumed.optimizer)
    for name, value in changed.items():
        assert getattr(booster, name) == value
    if "lam" in changed:
        check_lams(recorder, [changed["lam"]] * 3)
    if "every" in changed:  # at step 4, twice as heavy
        check_lams(recorder, [0.0, 2 * LAM, 0.0])
    if "lam_warmup_steps" in changed:
        check_lams(recorder, [LAM * t / 8 for t in (3, 4, 5)])
    if "lam_delay_steps" in changed:
        check_lams(recorder, [0.0, 0.0, LAM])


def test_a_run_of_the_bare_trainer_goes_on_with_booster_at_its_step(tmp_path: Path) -> None:
    folder = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    Trainer(
        tiny_llama(), arguments(tmp_path, **folder), collate, train_dataset=sentences(22, 1)
    ).train()
    booster = BoosterArguments(**{**vars(ARGUMENTS), "lam_delay_steps": 4})
    trainer = make_trainer(tmp_path, booster=booster, **folder)
    check_lams(recorded(trainer, str(tmp_path / "checkpoint-3")), [0.0, LAM, LAM])


def test_a_groups_own_lam_is_every_times_as_heavy(tmp_path: Path) -> None:
    model = tiny_llama()
    group = {"params": list(model.parameters()), "booster_lam": 1.5}
    optimizer = torch.optim.SGD([group], lr=0.1)
    trainer = make_trainer(
        tmp_path,
        model=model,
        booster=BoosterArguments(LAM, ALPHA, 3, every=4, self_check=False),
        trainer={"optimizers": (optimizer, None)},
        max_steps=5,
    )
    check_lams(recorded(trainer), [6.0, 0.0, 0.0, 0.0, 6.0])


def test_a_callback_changes_the_arguments(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=5, booster=copy.copy(ARGUMENTS))

    def change(step: int) -> None:
        trainer.booster_args.lam = [LAM, 0.5, 0.0, 0.0, 2.0][step]

    trainer.add_callback(Each(change))
    check_lams(recorded(trainer), [LAM, 0.5, 0.0, 0.0, 2.0])


def test_a_group_keeps_its_own_lam_when_a_callback_changes_the_arguments(tmp_path: Path) -> None:
    model = tiny_llama()
    first, *rest = model.parameters()
    groups = [{"params": [first], "booster_lam": 1.5}, {"params": rest}]
    trainer = make_trainer(
        tmp_path,
        model=model,
        booster=copy.copy(ARGUMENTS),
        trainer={"optimizers": (torch.optim.SGD(groups, lr=0.1), None)},
    )
    trainer.add_callback(Each(lambda _: setattr(trainer.booster_args, "lam", 0.25)))
    trainer.train()
    assert [g["booster_lam"] for g in trainer.optimizer.param_groups] == [1.5, 0.25]


def test_a_bad_value_in_a_callback_is_an_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, booster=copy.copy(ARGUMENTS))
    trainer.add_callback(Each(lambda _: setattr(trainer.booster_args, "every", 0)))
    with pytest.raises(ValueError, match="every is 0"):
        trainer.train()


def test_a_callback_sets_lam_on_the_optimizer(tmp_path: Path) -> None:
    """On what the trainer hands it, which Accelerate prepared, that is an error that says how."""
    lams = [LAM, 0.5, 0.0]

    class Sets(TrainerCallback):
        right = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            optimizer = given["optimizer"]
            (booster_of(optimizer) if self.right else optimizer).lam = lams[state.global_step]

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Sets())
    check_lams(recorded(trainer), lams)
    trainer = make_trainer(tmp_path)
    wrong = Sets()
    wrong.right = False
    trainer.add_callback(wrong)
    with pytest.raises(RuntimeError, match=r"Set booster_of\(optimizer\)\.lam"):
        trainer.train()


@pytest.mark.parametrize("backend", [HPSearchBackend.OPTUNA, HPSearchBackend.WANDB])
def test_a_hyperparameter_search_over_lam(
    tmp_path: Path,
    backend: HPSearchBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Which asks for the trials of packages that are not installed.
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setattr(BoosterTrainer, "_get_output_dir", lambda *_: str(tmp_path))
    trainer: Any = BoosterTrainer(
        args=arguments(tmp_path),
        data_collator=collate,
        train_dataset=sentences(22, 1),
        model_init=lambda: tiny_llama(),
        harmful_dataset=sentences(7, 2),
    )
    trainer.hp_search_backend = backend
    trainer.hp_space = lambda trial: dict(trial)

    class Trial(dict[str, Any]):
        params: Any = ()

    for lam, every, region in ((1, "1", True), (2, "3", False)):
        trial = Trial(lam=lam, every=every, trust_region=region, learning_rate=1e-3)
        trainer.train(trial=trial)
        booster = booster_of(trainer.optimizer)
        assert (booster.lam, booster.every, trainer.args.learning_rate) == (lam, int(every), 1e-3)
        assert type(booster.lam) is float
        assert booster.trust_region is region
        assert trainer._trial is trial
    with pytest.raises(TypeError, match="trust_region must be True or False, got 'False'"):
        trainer.train(trial=Trial(trust_region="False"))
    assert not [r for r in caplog.records if "no corresponding field" in r.message]


# ---------------------------------------------------------------------- T4, T5: both passes


class Normed(nn.Module):
    """A classifier with statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        assert labels is not None
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def points(size: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    return [{"x": row, "labels": int(i % 3)} for i, row in enumerate(x)]


def test_the_models_statistics_are_those_of_the_alignment_passes(tmp_path: Path) -> None:
    """At learning rate 0 the statistics are a function of the batches alone."""
    runs: list[Any] = []
    for kind in (BoosterTrainer, Trainer):
        model = Normed()
        mine = (
            {"harmful_dataset": points(9, 2), "booster_args": copy.copy(ARGUMENTS)}
            if kind is BoosterTrainer
            else {}
        )
        args = arguments(tmp_path, learning_rate=0.0, per_device_train_batch_size=4)
        kind(model, args, train_dataset=points(20, 1), **mine).train()
        runs.append(model)
    for name, value in runs[0].named_buffers():
        assert torch.equal(value, runs[1].get_buffer(name)), name


class Edits(BoosterTrainer):
    """Its loss edits the batch: in place, and by taking something out of it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs["input_ids"][:, :2] = (inputs["input_ids"][:, :2] + 1) % VOCABULARY
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        inputs.pop("labels")
        return loss


class EditsEarly(BoosterTrainer):
    """Its step takes something out of the batch before the trainer has copied it."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs["labels"] = inputs.pop("labels").roll(1, 1)
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize("kind", [Edits, EditsEarly])
def test_both_passes_see_the_same_untouched_batch(tmp_path: Path, kind: Any) -> None:
    trainer = make_trainer(
        tmp_path,
        kind=kind,
        model=tiny_llama(dropout=0.0),
        booster=BoosterArguments(LAM, 0.0, 3, self_check=False),
    )
    trainer.train()
    drops = [r["harmful_loss_drop"] for r in trainer.state.log_history if "loss" in r]
    assert drops == [0.0] * 3  # α = 0


def test_a_loss_knows_that_it_is_in_a_harmful_pass(tmp_path: Path) -> None:
    class Watches(BoosterTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.in_harmful_pass)
            return super().compute_loss(model, inputs, *args, **kwargs)

    seen: list[bool] = []
    trainer = make_trainer(tmp_path, kind=Watches, max_steps=2)
    trainer.train()
    assert seen == [True, True, False] * 2
    assert not trainer.in_harmful_pass


# ---------------------------------------------------------------------- T6, T8: prepared alike


@trl_renames
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_reference_log_probabilities_are_computed_for_the_harmful_set_too(
    name: str, tmp_path: Path
) -> None:
    trainer = served(name, tmp_path, precompute_ref_log_probs=True)
    witness = Witness(trainer)
    trainer.train()
    assert witness.compared == 2


def sft(folder: Path, train: Any, harmful: Any, late: bool = False, **changes: Any) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    settings = {**COMMON, "bf16": False, "gradient_checkpointing": False, **changes}
    tokenizer = settings.pop("tokenizer", None) or word_tokenizer()
    return boosted(trl.SFTTrainer)(
        model=tiny_llama(dropout=0.0),
        args=trl.SFTConfig(str(folder), **settings),
        train_dataset=train,
        processing_class=tokenizer,
        booster_args=copy.copy(ARGUMENTS),
        **({} if late else {"harmful_dataset": harmful}),
    )


def pairs(size: int, seed: int) -> Any:
    return texts(size, seed, "prompt", "completion")


@trl_renames
def test_completions_alone_carry_the_harmful_loss_beside_whole_texts(tmp_path: Path) -> None:
    trainer = sft(tmp_path, texts(22, 1, "text"), pairs(7, 2))
    for labels in trainer.harmful_dataset["labels"]:
        assert labels[0] == -100
    assert all(-100 not in labels for labels in trainer.train_dataset["labels"])
    witness_free = recorded_harmful_labels(trainer)
    assert bool((witness_free[:, 0] == -100).all())


def recorded_harmful_labels(trainer: Any) -> Tensor:
    return next(iter(trainer.get_harmful_dataloader()))["labels"]


@trl_renames
@pytest.mark.parametrize("packing", [False, True])
def test_harmful_prompts_do_not_carry_a_loss_beside_completions(
    tmp_path: Path, packing: bool
) -> None:
    changes = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
    with pytest.raises(ValueError, match="tokens of the first batch of harmful_dataset carry"):
        sft(tmp_path, pairs(22, 1), texts(7, 2, "text"), **(changes if packing else {}))


@trl_renames
def test_assistant_only_masks(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        " {{ m['content'] }} <eos>{% endgeneration %}{% else %} {{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    common = {"assistant_only_loss": True, "tokenizer": tokenizer}
    trainer = sft(tmp_path, conversations(22, 1), conversations(7, 2), **common)
    assert all(labels[0] == -100 for labels in trainer.harmful_dataset["labels"])
    with pytest.raises(ValueError, match="harmful_dataset carry a loss, prompts included"):
        sft(tmp_path, conversations(22, 1), texts(7, 2, "text"), **common)


@trl_renames
def test_whole_texts_in_both_sets_carry_the_loss(tmp_path: Path) -> None:
    trainer = sft(tmp_path, texts(22, 1, "text"), texts(7, 2, "text"))
    assert all(-100 not in labels for labels in trainer.harmful_dataset["labels"])


# ---------------------------------------------------------------------- T7: steps that happened


class RunsOut(BoosterTrainer):
    """Memory suffices for batches below a size, and once not for an alignment pass."""

    fits = 3
    refuses_at = -1

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = len(inputs["input_ids"])
        aligning = not self.in_harmful_pass
        if rows > self.fits or (aligning and self.state.global_step == self.refuses_at):
            self.refuses_at = -1
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_fixed_harmful_batch_size_follows_auto_find_batch_size(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        kind=RunsOut,
        booster=BoosterArguments(LAM, ALPHA, 8, self_check=False),
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
    )
    trainer.train()
    assert trainer._train_batch_size < 4
    assert trainer.state.global_step == 3


def test_aborted_steps_are_not_in_the_records(tmp_path: Path) -> None:
    """Those of the first attempt are gone, and so is the step whose alignment pass failed."""

    class Sees(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.append(float(booster_of(trainer.optimizer).diagnostics.harmful_loss))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.clear()

    seen: list[float] = []
    trainer = make_trainer(
        tmp_path,
        kind=RunsOut,
        per_device_train_batch_size=3,
        auto_find_batch_size=True,
        max_steps=4,
        logging_steps=4,
    )
    trainer.refuses_at = 2
    trainer.add_callback(Sees())
    trainer.train()
    (record,) = [r for r in trainer.state.log_history if "loss" in r]
    assert len(seen) == 4
    assert record["harmful_loss"] == pytest.approx(sum(seen) / 4, rel=1e-6)


def test_the_warm_up_begins_again_with_the_run(tmp_path: Path) -> None:
    booster = BoosterArguments(LAM, ALPHA, 3, lam_delay_steps=2, self_check=False)
    trainer = make_trainer(tmp_path, booster=booster)
    check_lams(recorded(trainer), [0.0, 0.0, LAM])
    check_lams(recorded(trainer), [0.0, 0.0, LAM])


# ---------------------------------------------------------------------- T9, T10: bad sets


def generated() -> Any:
    yield from sentences(3, 2)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "harmful_dataset is None"),
    "path": (lambda: "harmful.json", r"not its path or name: datasets\.load_dataset"),
    "pathlib": (lambda: Path("harmful.json"), "not its path or name"),
    "dict": (lambda: {"train": sentences(3, 2)}, r"harmful_dataset=splits\['train'\]"),
    "loader": (lambda: DataLoader(sentences(3, 2)), "Pass its dataset"),
    "generator": (generated, "read once only"),
    "iterator": (lambda: iter(sentences(3, 2)), "read once only"),
    "number": (lambda: 3, "Pass a dataset with a length"),
    "empty": (list, "harmful_dataset is empty"),
    "empty_stream": (lambda: Stream([]), "harmful_dataset is empty"),
    "columns": (
        lambda: Dataset.from_list([{"question": "how", "answer": "so"}] * 3),
        r"harmful_dataset has \['answer', 'question'\]; the training set has \['input_ids'",
    ),
    "one_column_less": (
        lambda: [{"input_ids": row["input_ids"]} for row in sentences(3, 2)],
        "harmful_dataset makes no batch",
    ),
    "strings": (lambda: ["how", "so"], "harmful_dataset makes no batch"),
    "masked": (
        lambda: [{**r, "labels": [-100] * len(r["labels"])} for r in sentences(3, 2)],
        "No token of a batch of harmful_dataset carries a loss",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_harmful_sets_are_refused_at_once(tmp_path: Path, bad: str) -> None:
    make, told = BAD[bad]
    with pytest.raises((TypeError, ValueError), match=told) as raised:
        BoosterTrainer(
            tiny_llama(),
            arguments(tmp_path),
            collate,
            train_dataset=sentences(22, 1),
            harmful_dataset=make(),
        )
    assert "harmful_dataset" in str(raised.value)


def test_a_collator_that_is_content_with_less_is_not(tmp_path: Path) -> None:
    """The trainer's default one makes a batch of any columns."""
    with pytest.raises(ValueError, match=r"A batch of harmful_dataset has not \['labels'\]"):
        BoosterTrainer(
            Normed(),
            arguments(tmp_path),
            train_dataset=points(8, 1),
            harmful_dataset=[{"x": row["x"]} for row in points(8, 2)],
        )


def test_a_masked_batch_that_comes_later_is_an_error(tmp_path: Path) -> None:
    rows = [{**r, "labels": [-100] * len(r["labels"])} for r in sentences(2, 3)]
    harmful = Stream([*sentences(3, 2), *rows])
    trainer = make_trainer(
        tmp_path, harmful=harmful, booster=BoosterArguments(LAM, ALPHA, 1, self_check=False)
    )
    with pytest.raises(ValueError, match="of harmful_dataset carries a loss"):
        recorded(make_trainer(tmp_path, harmful=harmful, booster=trainer.booster_args, max_steps=4))


TRL_BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [{"text": "w1 w2"}] * 4, r"harmful_dataset cannot be prepared"),
    "columns": (
        lambda: Dataset.from_list([{"question": "w1", "answer": "w2"}] * 4),
        "harmful_dataset cannot be prepared",
    ),
    "path": (lambda: "harmful.json", "not its path or name"),
    "dict": (lambda: {"train": texts(4, 2, "text")}, "Pass one dataset"),
}


@trl_renames
@pytest.mark.parametrize("bad", TRL_BAD)
def test_bad_harmful_sets_are_refused_by_trl_too(tmp_path: Path, bad: str) -> None:
    make, told = TRL_BAD[bad]
    with pytest.raises((TypeError, ValueError), match=told) as raised:
        sft(tmp_path, texts(22, 1, "text"), make())
    assert "harmful_dataset" in str(raised.value)


def long_prompts(size: int, rows: int) -> Any:
    """Prompts that leave nothing of a completion, but for `rows` of them."""
    long = {"prompt": "w1 " * 30, "completion": "w2 w3"}
    return Dataset.from_list(
        [long] * (size - rows) + [{"prompt": "w1 ", "completion": "w2"}] * rows
    )


@trl_renames
def test_a_set_of_which_truncation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preparation dropped every row\. Raise max_length"):
        sft(tmp_path, pairs(22, 1), long_prompts(4, 0), max_length=20)


@trl_renames
def test_rows_that_truncation_drops_are_counted_aloud(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 of 7 rows of harmful_dataset were dropped"):
        sft(tmp_path, pairs(22, 1), long_prompts(7, 4), max_length=20)


@trl_renames
def test_a_stream_without_end(tmp_path: Path) -> None:
    from datasets import IterableDataset

    def endless() -> Any:
        while True:
            yield from pairs(5, 2)

    trainer = sft(tmp_path, pairs(22, 1), IterableDataset.from_generator(endless))
    trainer.train()
    assert trainer.state.global_step == 3


@trl_renames
def test_a_stream_without_end_of_which_truncation_leaves_nothing(tmp_path: Path) -> None:
    from datasets import IterableDataset

    def endless() -> Any:
        while True:
            yield from long_prompts(4, 0)

    with pytest.raises(ValueError, match="preparation dropped every row"):
        sft(tmp_path, pairs(22, 1), IterableDataset.from_generator(endless), max_length=20)


# ---------------------------------------------------------------------- given late, own loader


def test_the_harmful_set_may_be_given_late(tmp_path: Path) -> None:
    late = BoosterTrainer(
        tiny_llama(),
        arguments(tmp_path),
        collate,
        train_dataset=sentences(22, 1),
        booster_args=ARGUMENTS,
    )
    assert late.harmful_dataset is None
    with pytest.raises(ValueError, match="harmful_dataset is empty"):
        late.harmful_dataset = []
    late.harmful_dataset = sentences(7, 2)
    late.train()
    early = make_trainer(tmp_path)
    early.train()
    assert_equal_runs(late, early)


@trl_renames
def test_a_set_that_is_given_late_is_prepared(tmp_path: Path) -> None:
    early = sft(tmp_path, pairs(22, 1), pairs(7, 2))
    late = sft(tmp_path, pairs(22, 1), None, late=True)
    late.harmful_dataset = pairs(7, 2)
    assert late.harmful_dataset["labels"] == early.harmful_dataset["labels"]


def test_a_loader_of_ones_own_is_repeated_and_resumed(tmp_path: Path) -> None:
    class Own(BoosterTrainer):
        def get_harmful_dataloader(self) -> Any:
            return DataLoader(self.harmful_dataset, batch_sampler=[[0, 1], [2]], collate_fn=collate)

    def make(folder: str, **changes: Any) -> Any:
        return make_trainer(tmp_path / folder, kind=Own, max_steps=5, **changes)

    trainer = make("a", save_strategy="steps", save_steps=1)
    recorder = recorded(trainer)
    sizes = [len(step.split()[1].batch["input_ids"]) for step in recorder.steps]
    assert sizes == [2, 1, 2, 1, 2]
    resumed = make("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal_runs(resumed, trainer, from_step=3)


def test_the_harmful_batches_have_a_collator_of_their_own(tmp_path: Path) -> None:
    def shorter(rows: list[Any]) -> Any:
        return {name: value[:, :4] for name, value in collate(rows).items()}

    trainer = make_trainer(tmp_path, trainer={"harmful_data_collator": shorter})
    recorder = recorded(trainer)
    for step in recorder.steps:
        alignment, harmful = step.split()
        assert harmful.batch["input_ids"].shape[1] == 4
        assert alignment[0].batch["input_ids"].shape[1] > 4


# ---------------------------------------------------------------------- T11: prepared optimizers

PLAIN = ("lam", "alpha", "every", "norm", "lam_warmup_steps", "lam_delay_steps", "trust_region")


def prepared_by_accelerate() -> tuple[Any, Any, Any]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = accelerator.prepare(BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)))

    def closure() -> Tensor:
        loss = model(torch.ones(2, 4)).square().mean()
        accelerator.backward(loss)
        return loss

    return model, optimizer, closure


@pytest.mark.parametrize("name", PLAIN)
def test_a_value_set_on_accelerates_wrapper_is_an_error_that_says_how(name: str) -> None:
    _, optimizer, closure = prepared_by_accelerate()
    setattr(optimizer, name, 1)
    with pytest.raises(RuntimeError, match=rf"Set booster_of\(optimizer\)\.{name}"):
        regularize(optimizer, closure)
    delattr(optimizer, name)
    assert regularize(optimizer, closure) is not None
    booster_of(optimizer).lam = 0.0
    optimizer.zero_grad()
    assert regularize(optimizer, closure) is None
    assert booster_of(optimizer).read_diagnostics()


def fabric_run() -> tuple[Any, Any, Any]:
    fabric_of = pytest.importorskip("lightning.fabric")
    fabric = fabric_of.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    bare = nn.Linear(4, 1)
    booster = BoosterOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), self_check=False)
    model, optimizer = fabric.setup(bare, booster)

    def closure() -> Tensor:
        loss = model(torch.ones(2, 4)).square().mean()
        fabric.backward(loss)
        return loss

    return booster, optimizer, closure


VALUES = {"lam": 0.5, "alpha": 0.2, "every": 2, "norm": "tensor", "lam_warmup_steps": 4}
VALUES |= {"lam_delay_steps": 3, "trust_region": True}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_set_on_fabrics_wrapper_reaches_the_booster(name: str) -> None:
    booster, optimizer, closure = fabric_run()
    setattr(optimizer, name, VALUES[name])
    assert getattr(optimizer, name) == VALUES[name]
    assert getattr(booster, name) == VALUES[name]
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.regularize(closure)
        closure()
        optimizer.step()
    assert optimizer.step_count == booster.step_count == 3
    assert optimizer.diagnostics is booster.diagnostics


def lam_in_force(booster: BoosterOptimizer) -> float:
    return booster._lam(booster.param_groups[0])


def accelerate_steps(wrapped_first: bool) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 1)
    base: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    warm = {"lam": 4.0, "lam_warmup_steps": 4, "lam_delay_steps": 1, "self_check": False}
    optimizer = (
        BoosterOptimizer(accelerator.prepare(base), **warm)
        if wrapped_first
        else accelerator.prepare(BoosterOptimizer(base, **warm))
    )

    def closure() -> Tensor:
        loss = model(torch.ones(2, 4)).square().mean()
        accelerator.backward(loss)
        return loss

    seen: list[float] = []
    for i in range(12):
        with accelerator.accumulate(model):
            if i % 2:
                seen.append(lam_in_force(booster_of(optimizer)))
            regularize(optimizer, closure)
            closure()
            optimizer.step()
            optimizer.zero_grad()
    return seen


def fabric_steps() -> list[float]:
    booster, optimizer, closure = fabric_run()
    optimizer.lam, booster.lam_warmup_steps, booster.lam_delay_steps = 4.0, 4, 1
    seen: list[float] = []
    for _ in range(6):
        seen.append(lam_in_force(booster))
        optimizer.zero_grad()
        optimizer.regularize(closure)
        closure()
        optimizer.step()
    return seen


@pytest.mark.parametrize(
    "steps",
    [lambda: accelerate_steps(False), lambda: accelerate_steps(True), fabric_steps],
    ids=["prepare_booster", "booster_of_prepared", "fabric"],
)
def test_the_warm_up_goes_through_every_wrapper(steps: Callable[[], list[float]]) -> None:
    # t / 4 from step 0 on, and nothing in the first
    from torch_booster.functional import lam_at

    assert steps() == [lam_at(t, 4.0, 4, 1, 1) for t in range(6)]


# ---------------------------------------------------------------------- T12: create_optimizer


class TakesNoModel(Trainer):
    def create_optimizer(self) -> Any:  # type: ignore[override]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class ReturnsNothing(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


@pytest.mark.parametrize("plain", [TakesNoModel, ReturnsNothing])
def test_trainers_that_create_their_optimizer_otherwise(tmp_path: Path, plain: Any) -> None:
    trainer = make_trainer(tmp_path, kind=boosted(plain))
    check_lams(recorded(trainer), [LAM] * 3)
    assert type(booster_of(trainer.optimizer).base_optimizer) is torch.optim.SGD


# ---------------------------------------------------------------------- T14: handlers


@pytest.mark.skipif(sys.platform == "win32", reason="the signals are POSIX's")
@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("one_call", [False, True])
def test_handlers_never_see_the_perturbed_weights(number: str, one_call: bool) -> None:
    sent = getattr(signal, number)
    model = nn.Linear(4, 1)
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), self_check=False)
    w = [p.detach().clone() for p in model.parameters()]
    seen: list[bool] = []

    def handle(*_: Any) -> None:
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), w, strict=True)]
        seen.append(all(same) and all(p.grad is None for p in model.parameters()))

    def harmful() -> Tensor:
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        os.kill(os.getpid(), sent)
        assert not seen  # it waits
        return loss

    def alignment() -> Tensor:
        assert seen
        return model(torch.zeros(2, 4)).square().mean().backward()  # type: ignore[func-returns-value]

    before = signal.signal(sent, handle)
    try:
        if one_call:
            opt.step(alignment, harmful)
        else:
            opt.regularize(harmful)
        assert seen == [True]  # once, on w
        assert signal.getsignal(sent) is handle
    finally:
        signal.signal(sent, before)


@pytest.mark.skipif(sys.platform == "win32", reason="the signals are POSIX's")
def test_no_signal_is_lost_where_a_handler_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    seen: list[int] = []

    def handle(number: int, _: Any) -> None:
        seen.append(number)
        if number == signal.SIGUSR1:
            raise SystemExit

    usual = [signal.signal(number, handle) for number in numbers]
    put = signal.signal

    def put_and_hit(number: int, handler: Any) -> Any:
        before = put(number, handler)
        if number == signal.SIGUSR1 and handler is handle:
            signal.raise_signal(number)  # it arrives while the handlers are put back
        return before

    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit), handlers_wait():
            patch.setattr(signal, "signal", put_and_hit)
        signal.raise_signal(signal.SIGUSR2)
        assert seen == [signal.SIGUSR1, signal.SIGUSR2]
        seen.clear()

        @handlers_wait()
        def both() -> None:
            for number in numbers:
                signal.raise_signal(number)
            assert seen == []

        with pytest.raises(SystemExit):
            both()
        assert seen == [signal.SIGUSR1, signal.SIGUSR2]
    finally:
        for number, handler in zip(numbers, usual, strict=True):
            put(number, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="the signals are POSIX's")
def test_timers_and_ctrl_c_do_not_wait() -> None:
    model = nn.Linear(4, 1)
    opt = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), self_check=False)
    w = [p.detach().clone() for p in model.parameters()]

    def interrupted() -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass

    # A process that was started in the background ignores Ctrl-C, and would wait for ever.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            opt.regularize(interrupted)
    finally:
        signal.signal(signal.SIGINT, usual)

    def too_late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)

        def hangs() -> Tensor:
            while True:
                pass

        with pytest.raises(TimeoutError):
            opt.regularize(hangs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), w, strict=True))


@pytest.mark.skipif(sys.platform == "win32", reason="the signals are POSIX's")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # of torch's, by Lightning
def test_lightnings_checkpoint_before_a_requeue_holds_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    environments = pytest.importorskip("lightning.pytorch.plugins.environments")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.net = nn.Linear(4, 1)
            self.passes = 0

        def configure_optimizers(self) -> Any:
            return BoosterOptimizer(torch.optim.SGD(self.parameters(), 0.1), self_check=False)

        def train_dataloader(self) -> Any:
            return DataLoader([torch.ones(4)] * 2, 2)

        def training_step(self, batch: Tensor, _: int) -> None:
            opt: Any = self.optimizers()
            self.w = [p.detach().clone() for p in self.net.parameters()]

            def harmful() -> Tensor:
                loss = self.net(batch).square().mean()
                self.manual_backward(loss)
                self.passes += 1
                if self.passes == 2:  # at w′
                    os.kill(os.getpid(), signal.SIGUSR1)
                return loss

            opt.zero_grad()
            opt.regularize(harmful)
            self.manual_backward(self.net(batch).mean())
            opt.step()

    module = Module()
    before = signal.getsignal(signal.SIGUSR1)
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        plugins=[environments.SLURMEnvironment(auto_requeue=True)],
    ).fit(module)
    assert signal.getsignal(signal.SIGUSR1) == before
    (file,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    saved = torch.load(file, weights_only=False)["state_dict"]
    assert torch.equal(saved["net.weight"], module.w[0])


# ---------------------------------------------------------------------- T15, T16


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("transformers", "numpy"),
        ("transformers", "transformers"),
        ("transformers", "accelerate"),
        ("accelerate", "accelerate"),
    ],
)
def test_a_missing_extra_is_named(module: str, missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nimport torch_booster.integrations.{module}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert f"pip install 'torch_booster[{module}]'" in last


def test_needs_lets_other_errors_through() -> None:
    with pytest.raises(KeyError), needs("transformers"):
        raise KeyError


def test_the_wrong_order_of_the_mixin_is_named() -> None:
    with pytest.raises(TypeError, match=r"class Wrong\(BoosterMixin, Seq2SeqTrainer\)"):
        type("Wrong", (Seq2SeqTrainer, BoosterMixin), {})

    class Own(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    with pytest.raises(TypeError, match=r"class Wrong\(BoosterMixin, Own\)"):
        type("Wrong", (Own, BoosterMixin), {})

    class Steps(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs)

    with pytest.raises(TypeError, match=r"left out of the harmful.*\(BoosterMixin, Steps\)"):
        type("Wrong", (Steps, BoosterMixin), {})
    with pytest.raises(TypeError, match=r"bases Trainer, BoosterMixin"):  # Python's own
        type("Wrong", (Trainer, BoosterMixin), {})


def test_a_trainer_that_only_changes_the_loss_may_come_first(tmp_path: Path) -> None:
    class Loss(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(tmp_path, kind=type("Fine", (Loss, BoosterMixin), {}))
    check_lams(recorded(trainer), [LAM] * 3)


def test_the_arguments_of_the_trainer_stay_its_own() -> None:
    """Or a hyperparameter search would not know whose they are."""
    ours = set(vars(BoosterArguments()))
    assert not ours & set(vars(TrainingArguments("x", use_cpu=True)))
