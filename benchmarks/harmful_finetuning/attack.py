"""The attack: a user fine-tunes an aligned model on data of which a part is harmful."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from benchmarks.harmful_finetuning import score
from benchmarks.harmful_finetuning.loading import loading, read_json
from benchmarks.harmful_finetuning.methods.stage import Stage
from benchmarks.harmful_finetuning.models import Tell, adapted, load_model, load_tokenizer
from benchmarks.harmful_finetuning.settings import Settings
from benchmarks.harmful_finetuning.tokens import batches
from benchmarks.harmful_finetuning.training import make_optimizer, train

if TYPE_CHECKING:
    from benchmarks.harmful_finetuning.data import Samples
    from benchmarks.harmful_finetuning.language import Example


def attack(
    settings: Settings,
    samples: Samples,
    user: list[Example],
    base: Path,
    aligned: Path,
    kind: type[Stage],
    hyperparameters: dict[str, Any],
    one_adapter: bool,
    seed: int,
    tell: Tell,
) -> dict[str, Any]:
    """Fine-tunes an aligned model and follows what becomes of it.

    Args:
        settings: Of the run.
        samples: What is asked, and the alignment's samples for methods that use them again.
        user: What the user fine-tunes on.
        base: Folder of the base model.
        aligned: Folder of the aligned one.
        kind: The method's fine-tuning stage.
        hyperparameters: Its own.
        one_adapter: Whether the method's LoRA goes through both stages in the paper.
        seed: Of the samples and their order, and of a second LoRA's weights.
        tell: Is told of each step.

    Returns:
        Scores and answers before and after, the curve between, the alignment's trace, and times.
    """
    torch.manual_seed(seed + 1_000)
    tokenizer = load_tokenizer(base, settings)
    model = to_attack(settings, base, aligned, one_adapter)
    own, steps = settings.attack, settings.attack.steps
    optimizer = make_optimizer(own.optimizer, model, own.lr, settings.align.weight_decay)
    stage = kind(model, optimizer, **hyperparameters)
    before = score.evaluate(model, tokenizer, settings, samples)
    curve = [_point(0, before)]

    def follow(step: int) -> None:
        if step % settings.score.every == 0 and step < steps:
            found = score.evaluate(model, tokenizer, settings, samples, during=True)
            curve.append(_point(step, found))
            model.train()
        tell(f"attack, seed {seed}, p = {own.p:g}", step, steps)

    trained = train(
        stage,
        batches(user, tokenizer, settings, seed + 2),
        batches(samples.alignment, tokenizer, settings, seed + 3),
        steps,
        settings.align.max_grad_norm,
        follow,
    )
    after = score.evaluate(model, tokenizer, settings, samples)
    alignment = read_json(aligned / "alignment.json")
    return {
        "alignment": alignment["trace"],
        "warnings": alignment["warnings"],
        "align_seconds_per_step": alignment["seconds"],
        "align_passes_per_step": alignment["passes"],
        "attack_seconds_per_step": trained.seconds,
        "aligned": before.scores,
        "aligned_answers": before.answers,
        "aligned_kind_answers": before.kind_answers,
        "curve": [*curve, _point(steps, after)],
        "attacked": after.scores,
        "answers": after.answers,
        "kind_answers": after.kind_answers,
    }


def _point(step: int, found: score.Evaluated) -> dict[str, float]:
    return {"step": step} | {k: v for k, v in found.scores.items() if "harmful" in k}


def to_attack(settings: Settings, base: Path, aligned: Path, one_adapter: bool) -> Any:
    """The aligned model with what the user trains: all weights, the same LoRA, or a second one."""
    if settings.trained == "full":
        return load_model(aligned, settings)
    model: Any = load_model(base, settings)
    with loading(aligned):
        model = PeftModel.from_pretrained(model, aligned, is_trainable=True)
    adapters = settings.attack.adapters
    if adapters == "single" or (adapters == "paper" and one_adapter):
        return model
    merged = model.merge_and_unload()
    return merged.requires_grad_() if adapters == "none" else adapted(merged, settings.lora)
