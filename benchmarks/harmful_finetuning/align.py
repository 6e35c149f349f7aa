"""Alignment stage: a defense trains a base model to refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harmful_finetuning.methods.stage import Stage
from benchmarks.harmful_finetuning.models import Tell, adapted, load_model, load_tokenizer
from benchmarks.harmful_finetuning.settings import Settings
from benchmarks.harmful_finetuning.tokens import batches
from benchmarks.harmful_finetuning.training import make_optimizer, train

if TYPE_CHECKING:
    from benchmarks.harmful_finetuning.data import Samples


def align(
    settings: Settings,
    samples: Samples,
    base: Path,
    kind: type[Stage],
    hyperparameters: dict[str, Any],
    seed: int,
    folder: Path,
    tell: Tell,
) -> None:
    """Aligns one model and saves it in ``folder``, with what was seen on the way.

    Args:
        settings: Of the run; the attack's and the scores' play no part.
        samples: Whose ``alignment`` and ``harmful`` are trained on.
        base: Folder of the base model.
        kind: The method's alignment stage.
        hyperparameters: Its own.
        seed: Of LoRA's weights and of the batches.
        folder: Where the model or its adapter goes.
        tell: Is told of each step.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(base, settings)
    stage = prepared(settings, base, kind, hyperparameters)
    steps = settings.align.steps
    trained = train(
        stage,
        batches(samples.alignment, tokenizer, settings, seed),
        batches(samples.harmful, tokenizer, settings, seed + 1),
        steps,
        settings.align.max_grad_norm,
        lambda step: tell(f"align {kind.__name__}, seed {seed}", step, steps),
    )
    stage.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    (folder / "alignment.json").write_text(json.dumps(trained._asdict()))


def prepared(
    settings: Settings, base: Path, kind: type[Stage], hyperparameters: dict[str, Any]
) -> Stage:
    """The method's alignment stage on a fresh copy of the base model."""
    model = load_model(base, settings)
    if settings.trained == "lora":
        model = adapted(model, settings.lora)
    own = settings.align
    optimizer = make_optimizer(own.optimizer, model, own.lr, own.weight_decay)
    return kind(model, optimizer, **hyperparameters)
