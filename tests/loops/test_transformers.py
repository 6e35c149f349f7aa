"""Booster in transformers' Trainer and in TRL's, against the formula step by step.

A hook on the model records the batch and the random state of each forward pass. The oracle replays
them through `tests.reference` on a copy of the model, with a loss of its own; it takes neither the
order of the passes nor the choice of the data nor a count of tokens from the package.
"""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.multi_process import run_cases
from tests.replay import Batch, LossOf, Pass, replayed, token_mean, tokens_in
from torch_booster import BoosterOptimizer
from torch_booster.integrations.accelerate import booster_of
from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin, BoosterTrainer

VOCABULARY, SPOKEN = 24, 8
LAM, ALPHA = 3.0, 0.1


# ---------------------------------------------------------------------- model, data, trainer


def tiny_llama(seed: int = 0, dropout: float = 0.1, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=dropout,
            attn_implementation="eager",
            **config,
        )
    )


def sentences(size: int, seed: int) -> list[dict[str, list[int]]]:
    """Examples of unequal lengths; see `labels_of` for which tokens carry a loss."""
    source = random.Random(seed)
    lengths = [source.randrange(4, 12) for _ in range(size)]
    rows = [[source.randrange(1, VOCABULARY) for _ in range(n)] + [SPOKEN] for n in lengths]
    return [{"input_ids": row, "labels": labels_of(torch.tensor(row)).tolist()} for row in rows]


def labels_of(ids: Tensor) -> Tensor:
    """Tokens below SPOKEN belong to prompts (and 0 is padding)."""
    return torch.where(ids < SPOKEN, -100, ids)


def collate(rows: list[dict[str, list[int]]]) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids > 0).long()}


def noisy(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Draws from every global random state, as augmentation and masking do."""
    draws = (random.random(), np.random.random(), float(torch.rand(())))
    return {**row, "input_ids": [1 + int(1000 * sum(draws)) % 7, *row["input_ids"][1:]]}


class Noisy(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        return noisy(super().__getitem__(index))


class Stream(IterableDataset[Any]):
    """Rows in their own order, each epoch rotated; its workers share them out."""

    def __init__(self, rows: list[Any], noise: bool = False) -> None:
        self.rows, self.noise, self.epoch = rows, noise, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        turn = self.epoch % len(self.rows) if self.rows else 0
        for row in itertools.islice(self.rows[turn:] + self.rows[:turn], first, None, stride):
            yield noisy(row) if self.noise else row


COMMON: dict[str, Any] = {
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), **{**COMMON, **changes})


def make_trainer(
    folder: Path,
    *,
    kind: type[Trainer] = BoosterTrainer,
    model: nn.Module | None = None,
    harmful: Any = None,
    booster: BoosterArguments | None = None,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    return kind(
        model=tiny_llama() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=sentences(22, seed=1),
        data_collator=collate,
        harmful_dataset=sentences(7, seed=2) if harmful is None else harmful,
        booster_args=booster or BoosterArguments(LAM, ALPHA, 3, self_check=False),
        **(trainer or {}),
    )


# ---------------------------------------------------------------------- record and oracle


@dataclass
class Step:
    """One optimizer step: weights before it, the forward passes, the gradients it was given."""

    weights: list[Tensor]
    passes: list[Pass] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def split(self) -> tuple[list[Pass], Pass]:
        """The alignment passes and the harmful one, which comes twice before the last of them."""
        *before, first, second, last = self.passes
        assert first.same_as(second), "the harmful passes saw different batches"
        assert torch.equal(first.random_state, second.random_state), "... or different masks"
        return [*before, last], first


class Recorder(TrainerCallback):
    def __init__(self, model: nn.Module) -> None:
        self.blank = copy.deepcopy(model).train()
        self.model = model
        self.steps: list[Step] = []
        self.calls: list[Batch] = []
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    @property
    def named(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            tensors = {k: v.clone() for k, v in kwargs.items() if isinstance(v, Tensor)}
            tensors.pop("num_items_in_batch", None)
            tensors.setdefault(
                "labels", labels_of(tensors["input_ids"])
            )  # not given to every model
            self.steps[-1].passes.append(Pass(tensors, torch.get_rng_state()))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Step([p.detach().clone() for p in self.named.values()]))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        # A parameter that nothing depends on has a gradient of None and a formula of zero.
        self.steps[-1].grads = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.named.values()
        ]


def expected(
    recorder: Recorder,
    weights: list[Tensor],
    alignment: list[Pass],
    harmful: list[Pass],
    loss_of: LossOf = token_mean,
    lam: float = LAM,
) -> list[Tensor]:
    at = dict(zip(recorder.named, weights, strict=True))
    grads = replayed(recorder.blank, at, alignment, harmful, lam, ALPHA, loss_of)
    return [torch.zeros_like(at[n]) if g is None else g for n, g in grads.items()]


def assert_close(grads: list[Tensor], formula: list[Tensor], atol: float = 1e-6) -> None:
    assert len(grads) == len(formula)
    assert max(float(g.abs().max()) for g in formula) > 1e3 * atol  # the bound is not idle
    for grad, wanted in zip(grads, formula, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=atol)


def check_run(
    trainer: Any, accumulation: int = 1, loss_of: LossOf = token_mean
) -> tuple[Recorder, list[Step]]:
    recorder = Recorder(trainer.model)
    trainer.add_callback(recorder)
    trainer.train()
    assert len(recorder.steps) == trainer.args.max_steps
    assert len(recorder.steps[0].passes) == accumulation + 2  # the last of an epoch may be shorter
    for step in recorder.steps:
        alignment, harmful = step.split()
        assert_close(step.grads, expected(recorder, step.weights, alignment, [harmful], loss_of))
    return recorder, recorder.steps


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_are_the_formulas(tmp_path: Path, accumulation: int) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    _, steps = check_run(trainer, accumulation)
    alignment, _ = steps[0].split()
    if accumulation > 1:
        assert len({tokens_in([p]) for p in alignment}) > 1  # unequal, or nothing is tested


@pytest.mark.parametrize("stream", ["map", "iterable"])
def test_every_third_step_is_three_times_as_heavy(tmp_path: Path, stream: str) -> None:
    """Also after a resume in between; the harmful batches are those of the unthinned run."""
    rows: Any = sentences(7, seed=2) if stream == "map" else Stream(sentences(7, seed=2))

    def run(folder: str, every: int, resume: str | None = None, **changes: Any) -> Any:
        trainer = make_trainer(
            tmp_path / folder,
            harmful=rows,
            booster=BoosterArguments(LAM / every, ALPHA, 3, every, self_check=False),
            gradient_accumulation_steps=2,
            **changes,
        )
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    _, plain = run("plain", 1, max_steps=3)
    trainer, recorder = run("a", 3, max_steps=8, save_strategy="steps", save_steps=1)
    assert [len(step.passes) for step in recorder.steps[:4]] == [4, 2, 2, 4]
    thinned = [step for i, step in enumerate(recorder.steps) if i % 3 == 0]
    assert harmful_ids(thinned) == harmful_ids(plain.steps)
    for step in thinned:
        alignment, harmful = step.split()
        assert_close(step.grads, expected(recorder, step.weights, alignment, [harmful]))
    for cut in (3, 4):
        resumed, _ = run("b", 3, str(tmp_path / "a" / f"checkpoint-{cut}"), max_steps=8)
        assert_equal_runs(resumed, trainer, from_step=cut)


def test_lam_grows_over_the_warm_up(tmp_path: Path) -> None:
    """Also after a resume in between."""

    def run(folder: str, resume: str | None = None) -> Any:
        trainer = make_trainer(
            tmp_path / folder,
            booster=BoosterArguments(LAM, ALPHA, 3, lam_warmup_steps=4, self_check=False),
            gradient_accumulation_steps=2,
            max_steps=5,
            save_strategy="steps",
            save_steps=1,
        )
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    trainer, recorder = run("a")
    assert [len(step.passes) for step in recorder.steps] == [2, 4, 4, 4, 4]
    for t, step in enumerate(recorder.steps[1:], 1):
        alignment, harmful = step.split()
        lam = LAM * min(1.0, t / 4)
        wanted = expected(recorder, step.weights, alignment, [harmful], lam=lam)
        assert_close(step.grads, wanted)
    assert trainer.optimizer.optimizer.lam == LAM
    resumed, _ = run("b", str(tmp_path / "a" / "checkpoint-3"))
    assert_equal_runs(resumed, trainer, from_step=3)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_that_counts_no_tokens(tmp_path: Path, accumulation: int) -> None:
    """Such a loss is averaged over micro-batches, of which the harmful batch has one."""
    model = tiny_llama()
    model.accepts_loss_kwargs = False
    trainer = make_trainer(tmp_path, model=model, gradient_accumulation_steps=accumulation)
    recorder = Recorder(model)
    trainer.add_callback(recorder)
    trainer.train()

    for step in recorder.steps:
        alignment, harmful = step.split()
        weights = step.weights
        plain = [expected(recorder, weights, [p], [harmful], lam=0.0) for p in alignment]
        full = expected(recorder, weights, alignment[:1], [harmful])
        wanted = [
            sum(f) / len(alignment) + (g - f[0])
            for f, g in zip(zip(*plain, strict=True), full, strict=True)
        ]
        assert_close(step.grads, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    check_run(
        make_trainer(
            tmp_path,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        ),
        accumulation=2,
    )


def test_clipping_acts_on_the_combined_gradient(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=0.05)
    recorder = Recorder(trainer.model)
    trainer.add_callback(recorder)
    trainer.train()
    for step in recorder.steps:
        alignment, harmful = step.split()
        formula = expected(recorder, step.weights, alignment, [harmful])
        norm = torch.cat([g.flatten() for g in formula]).norm()
        assert norm > 0.05
        assert_close(step.grads, [g * 0.05 / norm for g in formula])


def test_label_smoothing(tmp_path: Path) -> None:
    def smoothed(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
        targets = labels[:, 1:].flatten()
        log_p = logits[:, :-1].flatten(0, 1).log_softmax(-1)[targets != -100]
        return 0.8 * token_mean(logits, labels, tokens) - 0.2 * log_p.mean(-1).sum() / tokens

    trainer = make_trainer(tmp_path, label_smoothing_factor=0.2, gradient_accumulation_steps=2)
    check_run(trainer, accumulation=2, loss_of=smoothed)


def test_compute_loss_func(tmp_path: Path) -> None:
    def squared(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
        one_hot = nn.functional.one_hot(labels[:, 1:].clamp(min=0), VOCABULARY)
        error = (logits[:, :-1].softmax(-1) - one_hot).square().sum(-1)
        return (error * (labels[:, 1:] != -100)).sum() / tokens

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return squared(outputs.logits, labels, int(num_items_in_batch))

    trainer = make_trainer(
        tmp_path, trainer={"compute_loss_func": compute_loss}, gradient_accumulation_steps=4
    )
    check_run(trainer, accumulation=4, loss_of=squared)


# peft asks models for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path: Path) -> None:
    """Only adapters are perturbed, and dropout draws the same masks in both harmful passes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_dropout=0.3, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_llama(), config)
    trainer = make_trainer(tmp_path, model=model, gradient_accumulation_steps=2)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    recorder, _ = check_run(trainer, accumulation=2)
    assert all("lora_" in name for name in recorder.named)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def with_lora(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config, **options)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("late", [False, True])
def test_lora_that_will_be_merged(tmp_path: Path, late: bool) -> None:
    """The harmful step is simulated beside the frozen weights, from the start or when told."""
    model = with_lora(tiny_llama())
    args = BoosterArguments(LAM, ALPHA, 3, perturb_merged=not late, self_check=False)
    trainer = make_trainer(tmp_path, model=model, booster=args, max_steps=2)
    weights = dict(model.named_parameters())
    seen: list[tuple[dict[str, Tensor], list[bool]]] = []

    def look(*_: Any) -> None:
        if trainer.in_harmful_pass:
            beside = booster_of(trainer.optimizer).perturbed or ()
            moved = [bool(offset.any()) for offset in beside]
            seen.append(({n: p.detach().clone() for n, p in weights.items()}, moved))
            args.perturb_merged = True

    hook = model.get_input_embeddings().register_forward_hook(look)
    trainer.train()
    hook.remove()
    step = 1 if late else 0
    (at_w, before), (at_w_prime, after) = seen[2 * step : 2 * step + 2]
    assert all(torch.equal(p, at_w_prime[n]) for n, p in at_w.items())
    assert (before, after) == ([False] * 2, [True] * 2)
    assert not any(offset.any() for offset in booster_of(trainer.optimizer).perturbed or ())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_that_will_be_merged_under_autocast(tmp_path: Path) -> None:
    """In bfloat16 passes the step is kept beside the merged weights, which do not move."""
    model = with_lora(tiny_llama().bfloat16())
    args = BoosterArguments(LAM, ALPHA, 3, perturb_merged=True)
    trainer = make_trainer(tmp_path, model=model, booster=args, max_steps=2, bf16=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    booster = booster_of(trainer.optimizer)
    assert [d.dtype for d in booster.perturbed or ()] == [torch.bfloat16] * 2
    assert booster.read_diagnostics()["perturbation_norm"] == pytest.approx(ALPHA, rel=0.01)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_that_will_be_merged_into_a_narrow_base(tmp_path: Path) -> None:
    model = with_lora(tiny_llama().bfloat16(), autocast_adapter_dtype=False)
    args = BoosterArguments(LAM, ALPHA, 3, perturb_merged=True, self_check=False)
    trainer = make_trainer(tmp_path, model=model, booster=args, max_steps=1)
    with pytest.warns(UserWarning, match="bf16=True with a Trainer"):
        trainer.train()


def test_merged_weights_where_there_are_none(tmp_path: Path) -> None:
    """An error each time it is asked for, and nothing at all where λ is zero."""
    make_trainer(tmp_path, booster=BoosterArguments(lam=0.0, perturb_merged=True)).train()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.booster_args.perturb_merged = True
    for _ in range(2):
        with pytest.raises(ValueError, match="no layer with an active adapter"):
            trainer.train()


def test_sharded_weights_are_not_perturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    trainer.booster_args = BoosterArguments(perturb_merged=True)  # as Axolotl sets it
    with pytest.raises(ValueError, match="FSDP shard"):
        trainer.create_optimizer()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_lam_zero_is_the_trainer_bit_for_bit(tmp_path: Path, smoothing: float) -> None:
    class Untouchable(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("harmful data was read")

    common: dict[str, Any] = {
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "label_smoothing_factor": smoothing,
    }
    mine = make_trainer(
        tmp_path,
        booster=BoosterArguments(lam=0.0),
        harmful=Untouchable(sentences(3, 0)),
        **common,
    )
    mine.train()
    plain = Trainer(
        tiny_llama(), arguments(tmp_path, **common), collate, train_dataset=sentences(22, seed=1)
    )
    plain.train()
    assert_equal_runs(mine, plain)


def assert_equal_runs(trainer: Any, other: Any, from_step: int = 0) -> None:
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    records, others = (
        [r for r in t.state.log_history if "loss" in r and r["step"] > from_step]
        for t in (trainer, other)
    )
    assert records
    assert records == others


# ---------------------------------------------------------------------- optimizers


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def prepared(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return Accelerator(cpu=True).prepare_optimizer(optimizer)


WAYS: dict[str, Callable[[nn.Module], tuple[dict[str, Any], dict[str, Any]]]] = {
    "optim": lambda m: ({"optim": "sgd"}, {}),
    "optimizers": lambda m: ({}, {"optimizers": (sgd(m), None)}),
    "accelerated": lambda m: ({}, {"optimizers": (prepared(sgd(m)), None)}),
    "class": lambda m: ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}),
}


@pytest.mark.parametrize("way", WAYS)
def test_any_way_to_choose_the_optimizer(tmp_path: Path, way: str) -> None:
    model = tiny_llama()
    changes, given = WAYS[way](model)
    trainer = make_trainer(tmp_path, model=model, trainer=given, **changes)
    check_run(trainer)
    booster = trainer.optimizer.optimizer
    assert type(booster) is BoosterOptimizer
    assert type(booster.base_optimizer) is torch.optim.SGD
    assert trainer.lr_scheduler.get_last_lr() == [0.0] * len(booster.param_groups)


def test_training_twice_wraps_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    first = trainer.optimizer.optimizer
    check_run(trainer)
    assert trainer.optimizer.optimizer is first


def test_groups_may_bring_their_own_lam(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "booster_lam": 1.5}], lr=0.1)
    trainer = make_trainer(tmp_path, model=model, trainer={"optimizers": (optimizer, None)})
    trainer.train()
    assert trainer.optimizer.optimizer.lam == 1.5
    assert trainer.optimizer.optimizer.alpha == ALPHA


class LossScaling(BoosterTrainer):
    """What accelerate sets up for fp16, which it refuses on a CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)


def test_a_trust_region_knows_the_scale_of_the_loss(tmp_path: Path) -> None:
    booster = BoosterArguments(LAM, 0.01, 3, trust_region=True, self_check=False)
    trainer = make_trainer(tmp_path, kind=LossScaling, booster=booster, max_steps=8)
    trainer.train()
    assert booster_of(trainer.optimizer).param_groups[0]["booster_trust_region"] == 1.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_scaling_skips_what_overflows(tmp_path: Path, accumulation: int) -> None:
    trainer = make_trainer(
        tmp_path, kind=LossScaling, max_steps=8, gradient_accumulation_steps=accumulation
    )
    for p in trainer.model.parameters():
        p.register_hook(lambda grad: torch.where(grad.abs() > 65504, torch.inf, grad))  # as fp16
    recorder = Recorder(trainer.model)
    trainer.add_callback(recorder)
    trainer.train()
    skipped = [
        all(torch.equal(v, w) for v, w in zip(step.weights, after.weights, strict=True))
        for step, after in itertools.pairwise(recorder.steps)
    ]
    assert True in skipped
    assert False in skipped
    scale = trainer.accelerator.scaler.get_scale()
    assert scale == 2.0 ** (20 - sum(skipped))
    last = recorder.steps[-1]
    alignment, harmful = last.split()
    formula = expected(recorder, last.weights, alignment, [harmful])
    assert_close([g / scale for g in last.grads], formula)
    assert "harmful_grad_norm" not in trainer.state.log_history[-2]  # it is the scaled one's
    assert "harmful_loss" in trainer.state.log_history[-2]


# ---------------------------------------------------------------------- logging


def test_records_hold_the_mean_diagnostics(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        logging_steps=2,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        trainer={"eval_dataset": sentences(4, seed=5)},
    )
    recorder = Recorder(trainer.model)
    trainer.add_callback(recorder)
    seen = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.append([float(v) for v in trainer.optimizer.optimizer.diagnostics])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    logged: list[dict[str, float]] = []
    trainer.add_callback(Watch())
    trainer.train()

    fields = ["harmful_loss", "perturbed_harmful_loss", "harmful_loss_drop"]
    fields += ["harmful_grad_norm", "perturbation_norm", "drop_ratio"]
    training = [r for r in logged if "learning_rate" in r]
    assert [r["epoch"] for r in training] == [2 / 11, 4 / 11]
    for record, steps in zip(training, (seen[:2], seen[2:]), strict=True):
        assert [record[f] for f in fields] == pytest.approx(np.mean(steps, axis=0), rel=1e-6)
        assert record["perturbation_norm"] == pytest.approx(ALPHA, rel=1e-4)
    others = [r for r in logged if "learning_rate" not in r]
    assert others
    assert not any(f in r for r in others for f in fields)

    # h(w) itself, from the oracle's side
    _, harmful = recorder.steps[0].split()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(harmful.random_state)
        inputs = {k: v for k, v in harmful.batch.items() if k != "labels"}
        logits = recorder.blank(**inputs).logits
    h = token_mean(logits, harmful.batch["labels"], tokens_in([harmful]))
    assert seen[0][0] == pytest.approx(float(h), rel=1e-5)


def test_nothing_waits_for_the_device_between_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, logging_strategy="no", max_steps=4)
    counted: list[int] = []
    regularize = BoosterMixin._regularize

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                counted.append(1)
            return func(*args, **(kwargs or {}))

    def watched(self: Any, booster: Any, run: Any) -> None:
        # Read and collated on the CPU, before anything counts.
        batch = self._next_harmful_batch(booster.step_count)
        monkeypatch.setattr(self, "_next_harmful_batch", lambda turn: batch)
        with Reads():
            regularize(self, booster, run)
        monkeypatch.delattr(self, "_next_harmful_batch")

    monkeypatch.setattr(BoosterMixin, "_regularize", watched)
    trainer.train()
    assert not counted


# ---------------------------------------------------------------------- the harmful stream


def harmful_ids(steps: list[Step]) -> list[list[list[int]]]:
    return [[row[row > 0].tolist() for row in step.split()[1].batch["input_ids"]] for step in steps]


@pytest.mark.parametrize("size", [2, 7, 50])
def test_map_style_stream_is_reshuffled_each_epoch(tmp_path: Path, size: int) -> None:
    rows = sentences(size, seed=2)
    _, steps = check_run(make_trainer(tmp_path, harmful=rows, max_steps=6))
    flat = [ids for batch in harmful_ids(steps) for ids in batch]
    assert len(flat) == 18
    whole = [flat[i : i + size] for i in range(0, len(flat) - size + 1, size)]
    for epoch in whole:
        assert sorted(epoch) == sorted(row["input_ids"] for row in rows)
    assert size == 2 or len(flat) < 2 * size or len({str(epoch) for epoch in whole}) > 1


def test_iterable_stream_keeps_its_order_and_learns_its_epoch(tmp_path: Path) -> None:
    rows = sentences(4, seed=2)
    _, steps = check_run(make_trainer(tmp_path, harmful=Stream(rows), max_steps=5))
    ids = [row["input_ids"] for row in rows]
    turned = ids[1:] + ids[:1]
    assert harmful_ids(steps)[:4] == [ids[:3], ids[3:], turned[:3], turned[3:]]


def test_data_seed_decides_the_order(tmp_path: Path) -> None:
    def order(**changes: Any) -> list[Any]:
        trainer = make_trainer(tmp_path, **changes)
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
        return harmful_ids(recorder.steps)

    assert order(data_seed=1) == order(data_seed=1, seed=3)
    assert order(data_seed=1) != order(data_seed=2)
    assert order() == order(data_seed=42)  # the trainer's default seed


def test_default_batch_size_is_the_micro_batchs(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        booster=BoosterArguments(LAM, ALPHA, self_check=False),
        per_device_train_batch_size=5,
    )
    _, steps = check_run(trainer)
    assert {len(batch) for batch in harmful_ids(steps)} == {5}


def test_workers_go_when_training_ends(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataloader_num_workers=1)
    seen: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(len(multiprocessing.active_children()))

    trainer.add_callback(Count())
    trainer.train()
    assert max(seen) == 2  # one for each loader
    gc.collect()
    assert not multiprocessing.active_children()


def test_columns_the_model_does_not_take_are_dropped(tmp_path: Path) -> None:
    rows = [{**row, "source": "a note"} for row in sentences(5, seed=2)]

    def strict(batch: list[dict[str, Any]]) -> Batch:
        assert all(row.keys() == {"input_ids", "labels"} for row in batch)
        return collate(batch)

    trainer = make_trainer(tmp_path, harmful=rows)
    trainer.data_collator = strict
    check_run(trainer)


# ---------------------------------------------------------------------- resume


STREAMS: dict[str, dict[str, Any]] = {
    "shorter": {"harmful": Noisy(sentences(2, seed=2))},
    "longer": {"harmful": Noisy(sentences(50, seed=2))},
    "iterable": {"harmful": Stream(sentences(5, seed=2), noise=True)},
    "workers": {"harmful": sentences(7, seed=2), "dataloader_num_workers": 1},
    "iterable_workers": {
        "harmful": Stream(sentences(5, seed=2), noise=True),
        "dataloader_num_workers": 2,
    },
}
CUTS = (1, 3, 4, 6, 8)  # an epoch of the training set has 22 / (2 * 3), hence 4 steps


@pytest.mark.parametrize("stream", STREAMS)
def test_resume_is_the_unbroken_run(tmp_path: Path, stream: str) -> None:
    def make(folder: str, **changes: Any) -> Any:
        changes = {**STREAMS[stream], **changes}
        return make_trainer(
            tmp_path / folder, max_steps=9, gradient_accumulation_steps=3, **changes
        )

    unbroken = make("a", save_strategy="steps", save_steps=1)
    unbroken.train()
    for cut in CUTS if "workers" not in stream else CUTS[1:4:2]:  # processes take time to start
        resumed = make("b", model=tiny_llama(seed=9))
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{cut}"))
        assert_equal_runs(resumed, unbroken, from_step=cut)


# ---------------------------------------------------------------------- two processes


def formula_case(rank: int, accumulation: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = distributed_trainer(folder, rank, gradient_accumulation_steps=accumulation)
        assert trainer.args.world_size == 2
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        for step in recorder.steps:
            alignment, harmful = zip(*gathered(step.split()), strict=True)
            everywhere = list(itertools.chain(*alignment))
            assert_close(step.grads, expected(recorder, step.weights, everywhere, list(harmful)))
            if step is recorder.steps[0]:
                assert len(everywhere) == 2 * accumulation
                assert len({tokens_in([p]) for p in harmful}) == 2  # unequal


def shares_case(rank: int, stream: str) -> None:
    rows = sentences(12, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        harmful = rows if stream == "map" else Stream(rows)
        trainer = distributed_trainer(folder, rank, harmful=harmful, max_steps=2)
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
        mine = [ids for batch in harmful_ids(recorder.steps) for ids in batch]
        seen = [ids for share in gathered(mine) for ids in share]
        assert sorted(seen) == sorted(row["input_ids"] for row in rows)  # each once, on one rank


def tensor_parallel_case(rank: int) -> None:
    """Ranks that share one model's layers are given one batch."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = distributed_trainer(folder, rank, max_steps=2)
        trainer.get_tp_size = lambda: 2
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
        first, second = gathered(harmful_ids(recorder.steps))
        assert first == second


def records_case(rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = distributed_trainer(folder, rank, max_steps=1)
        trainer.train()
        local = trainer.optimizer.optimizer.diagnostics.harmful_loss.item()
        first, second = gathered(local)
        assert first != second
        logged = trainer.state.log_history[0]["harmful_loss"]
        assert logged == pytest.approx((first + second) / 2, rel=1e-6)


def resume_case(rank: int, stream: str) -> None:
    """Every rank goes on with its own share and its own masks."""
    rows = sentences(5, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        folder = gathered(folder)[0]

        def make(**changes: Any) -> Any:
            harmful = Noisy(rows) if stream == "map" else Stream(rows, noise=True)
            return distributed_trainer(folder, rank, harmful=harmful, max_steps=5, **changes)

        unbroken = make(save_strategy="steps", save_steps=3)
        unbroken.train()
        resumed = make(model=tiny_llama(seed=9), save_strategy="steps", save_steps=3)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
        assert_equal_runs(resumed, unbroken, from_step=3)
        dist.barrier()


def distributed_trainer(folder: str, rank: int, **changes: Any) -> Any:
    # What a launcher sets; the group itself is there already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    return make_trainer(Path(folder), ddp_backend="gloo", **changes)


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None, None]
    dist.all_gather_object(values, value)
    return values


CASES = {
    "formula_1": partial(formula_case, accumulation=1),
    "formula_4": partial(formula_case, accumulation=4),
    "shares_map": partial(shares_case, stream="map"),
    "shares_iterable": partial(shares_case, stream="iterable"),
    "tensor_parallel": tensor_parallel_case,
    "records": records_case,
    "resume_map": partial(resume_case, stream="map"),
    "resume_iterable": partial(resume_case, stream="iterable"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    return run_cases(CASES, world_size=2)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[case] is None, outcomes[case]


# ---------------------------------------------------------------------- TRL


# TRL passes names on that transformers has renamed.
trl_renames = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def texts(size: int, seed: int, *columns: str) -> Any:
    from datasets import Dataset

    source = random.Random(seed)

    def phrase() -> str:
        return "".join(
            f"w{source.randrange(VOCABULARY - 3)} " for _ in range(source.randrange(3, 9))
        )

    return Dataset.from_list([{column: phrase() for column in columns} for _ in range(size)])


def trl_trainer(
    name: str, folder: Path, *columns: str, boosted: bool = True, **changes: Any
) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    plain = getattr(trl, f"{name}Trainer")
    kind = type("Boosted", (BoosterMixin, plain), {}) if boosted else plain
    mine = {
        "harmful_dataset": texts(7, 2, *columns),
        "booster_args": BoosterArguments(LAM, ALPHA, 3, self_check=False),
    }
    common = {**COMMON, "gradient_accumulation_steps": 2, "max_steps": 2, "eval_steps": 1}
    common |= {"eval_strategy": "steps", "gradient_checkpointing": False, "bf16": False}
    more = {"ref_model": tiny_llama(seed=1, dropout=0.0)} if name == "DPO" else {}
    return kind(
        model=tiny_llama(dropout=0.0),
        args=getattr(trl, f"{name}Config")(str(folder), **{**common, **changes}),
        train_dataset=texts(22, 1, *columns),
        eval_dataset=texts(4, 3, *columns),
        processing_class=word_tokenizer(),
        **(mine if boosted else {}),
        **more,
    )


def records_of(trainer: Any, *names: str) -> list[list[float]]:
    return [[r[n] for n in names] for r in trainer.state.log_history if "loss" in r]


@trl_renames
@pytest.mark.parametrize(
    ("columns", "changes"),
    [
        (["text"], {}),
        (["prompt", "completion"], {}),
        (["text"], {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    ],
    ids=["text", "completion_only", "packing"],
)
def test_sft_trainer(tmp_path: Path, columns: list[str], changes: dict[str, Any]) -> None:
    """Raw harmful text goes through TRL's preparation; the formula holds; its metrics are f's."""
    trainer = trl_trainer("SFT", tmp_path, *columns, **changes)
    recorder = Recorder(trainer.model)
    recorder.blank = tiny_llama(dropout=0.0).train()  # TRL has patched the forward of the other
    trainer.add_callback(recorder)
    torch.manual_seed(0)  # of the order of the training set
    trainer.train()
    for step in recorder.steps:
        alignment, harmful = step.split()
        assert len(alignment) == 2
        assert_close(step.grads, expected(recorder, step.weights, alignment, [harmful]))

    plain = trl_trainer("SFT", tmp_path, *columns, boosted=False, **changes)
    torch.manual_seed(0)
    plain.train()
    metrics = ["entropy", "mean_token_accuracy", "num_tokens"]
    assert records_of(trainer, *metrics)[0] == records_of(plain, *metrics)[0]  # at equal weights
    assert records_of(trainer, "num_tokens") == records_of(plain, "num_tokens")
    assert trainer.harmful_dataset.column_names == trainer.train_dataset.column_names


@trl_renames
def test_dpo_trainer(tmp_path: Path) -> None:
    """The harmful dataset holds pairs then, and h is the preference loss of TRL."""
    columns = ["prompt", "chosen", "rejected"]
    trainer = trl_trainer("DPO", tmp_path, *columns)
    trainer.train()
    plain = trl_trainer("DPO", tmp_path, *columns, boosted=False)
    plain.train()
    metrics = ["loss", "rewards/accuracies", "num_tokens"]
    assert records_of(trainer, *metrics)[0] == records_of(plain, *metrics)[0]
    drops = [drop for (drop,) in records_of(trainer, "harmful_loss_drop")]
    assert len(drops) == 2
    assert min(drops) > 0


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("harmful", "error", "message"),
    [
        (None, ValueError, "harmful_dataset is None"),
        ([], ValueError, "harmful_dataset is empty"),
    ],
)
def test_bad_harmful_dataset(tmp_path: Path, harmful: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        BoosterTrainer(tiny_llama(), arguments(tmp_path), harmful_dataset=harmful)


def test_harmful_dataset_is_required(tmp_path: Path) -> None:
    trainer = BoosterTrainer(tiny_llama(), arguments(tmp_path))
    with pytest.raises(ValueError, match=r"set trainer\.harmful_dataset before train"):
        trainer.train()


def test_empty_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="harmful_dataset is empty"):
        make_trainer(tmp_path, harmful=Stream([])).train()


def test_booster_optimizer_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    for optimizer in (
        BoosterOptimizer(sgd(model)),
        prepared(BoosterOptimizer(sgd(model))),
    ):
        with pytest.raises(TypeError, match="Pass its base optimizer"):
            make_trainer(tmp_path, model=model, trainer={"optimizers": (optimizer, None)})


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(ValueError, match="inside the backward pass"):
        make_trainer(tmp_path, optim=optim)


class UnderDeepSpeed(BoosterTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


def test_an_optimizer_that_deepspeed_would_drop_is_refused(tmp_path: Path) -> None:
    """What is served under DeepSpeed is tested in tests/deepspeed/test_trainer.py."""
    model = tiny_llama()
    given = {"optimizers": (torch.optim.AdamW(model.parameters()), None)}
    with pytest.raises(ValueError, match="Under DeepSpeed the trainer drops an optimizer"):
        make_trainer(tmp_path, kind=UnderDeepSpeed, model=model, trainer=given)
    make_trainer(tmp_path, kind=UnderDeepSpeed)


def test_accumulation_under_fsdp_is_refused_before_training(tmp_path: Path) -> None:
    class UnderFSDP(BoosterTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(RuntimeError, match="unreduced"):
        make_trainer(tmp_path, kind=UnderFSDP, gradient_accumulation_steps=2)


def test_bad_lam_is_refused_by_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lam must be finite and not negative"):
        make_trainer(tmp_path, booster=BoosterArguments(lam=-1.0)).train()


def test_a_resumed_run_goes_on_with_what_is_left_of_alpha(tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> Any:
        trainer = make_trainer(
            tmp_path / folder,
            booster=BoosterArguments(LAM, 50.0, 3, trust_region=True, self_check=False),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def fraction(trainer: Any) -> float:
        booster = booster_of(trainer.optimizer)
        assert booster.alpha == 50.0
        return booster.param_groups[0]["booster_trust_region"]

    whole = run("whole")
    assert fraction(whole) < 0.1
    resumed = run("whole", str(tmp_path / "whole" / "checkpoint-3"))
    assert fraction(resumed) == fraction(whole)
    wanted = whole.model.state_dict()
    assert all(torch.equal(p, wanted[name]) for name, p in resumed.model.state_dict().items())
    booster_of(resumed.optimizer).param_groups[0]["booster_trust_region"] = 2.0**-9
    resumed.train()  # anew, and so is α
    assert fraction(resumed) > 2.0**-9 * 1.05**6


def test_a_trust_region_is_on_or_off() -> None:
    with pytest.raises(TypeError, match="trust_region must be True or False"):
        BoosterArguments(trust_region=1)  # type: ignore[arg-type]


def test_every_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every is 0\. Pass at least 1"):
        BoosterArguments(every=0)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm is 'Global'"):
        BoosterArguments(norm="Global")  # type: ignore[arg-type]


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lam_warmup_steps is -1\. Pass at least 0"):
        BoosterArguments(lam_warmup_steps=-1)


def test_arguments_from_the_command_line() -> None:
    parser = HfArgumentParser(BoosterArguments)  # type: ignore[arg-type]
    (given,) = parser.parse_args_into_dataclasses(
        ["--lam", "20", "--alpha", "0.5", "--per_device_harmful_batch_size", "8", "--every", "4"]
    )
    assert given == BoosterArguments(20.0, 0.5, 8, 4)
    assert parser.parse_args_into_dataclasses([])[0] == BoosterArguments()
