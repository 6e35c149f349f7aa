"""The two stages of a run: alignment by a defense, then a user's fine-tuning with harmful samples.

Both are one plain loop around a method's `Stage`, which makes the gradient of a step; clipping and
the base optimizer are the same for all methods.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

import lora_alignment
from benchmarks.harmful_finetuning import methods, metrics, models
from benchmarks.harmful_finetuning.data import Samples, user_data
from benchmarks.harmful_finetuning.settings import Settings
from lora_alignment import Report, load_model, load_tokenizer, loading, read_json
from mini_language import Example

__all__ = ["align", "align_optimizer", "fine_tune", "given_to", "stream", "to_fine_tune"]


def align(
    settings: Settings,
    samples: Samples,
    base: Path,
    method: str,
    seed: int,
    folder: Path,
    report: Report,
) -> None:
    """Alignment stage: trains one model to refuse and saves it in ``folder``."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(base, settings)
    model = load_model(base, settings)
    if settings.trained == "lora":
        model = models.adapted(model, settings)
    kind = methods.METHODS[method].alignment
    stage = kind(model, align_optimizer(model, settings), **given_to(kind, settings))
    trace, seconds = _train(
        stage,
        stream(samples.alignment, tokenizer, settings, seed),
        stream(samples.harmful, tokenizer, settings, seed + 1),
        settings,
        settings.align_steps,
        lambda step: report(f"align {method}, seed {seed}", step, settings.align_steps),
    )
    model.save_pretrained(folder)
    record = {"alignment": trace, "align_seconds_per_step": seconds}
    (folder / "alignment.json").write_text(json.dumps(record))


def fine_tune(
    settings: Settings,
    samples: Samples,
    base: Path,
    aligned: Path,
    method: str,
    seed: int,
    report: Report,
) -> dict[str, Any]:
    """Fine-tunes an aligned model on the user's data and follows what becomes of it."""
    torch.manual_seed(seed + 1_000)
    tokenizer = load_tokenizer(base, settings)
    model = to_fine_tune(settings, base, aligned, method)
    kind = methods.METHODS[method].fine_tuning
    given = given_to(kind, settings)
    if "steps" in methods.hyperparameters(kind):
        given["steps"] = settings.fine_tune_steps
    optimizer = _optimizer(
        settings.fine_tune_optimizer, model, settings.fine_tune_lr, settings.weight_decay
    )
    stage = kind(model, optimizer, **given)
    result: dict[str, Any] = read_json(aligned / "alignment.json")
    result["aligned"] = metrics.evaluate(model, tokenizer, settings, samples)
    result["aligned_responses"] = metrics.responses(model, tokenizer, settings, samples)
    curve = [{"step": 0} | {k: v for k, v in result["aligned"].items() if "harmful" in k}]

    def follow(step: int) -> None:
        if step % settings.eval_every == 0 or step == settings.fine_tune_steps:
            scores = metrics.evaluate(model, tokenizer, settings, samples, during=True)
            curve.append({"step": step, **scores})
            model.train()
        name = f"fine-tune {method}, seed {seed}, p = {settings.p:g}"
        report(name, step, settings.fine_tune_steps)

    _, seconds = _train(
        stage,
        stream(user_data(samples, settings, seed), tokenizer, settings, seed + 2),
        stream(samples.alignment, tokenizer, settings, seed + 3),
        settings,
        settings.fine_tune_steps,
        follow,
    )
    return result | {
        "curve": curve,
        "attacked": metrics.evaluate(model, tokenizer, settings, samples),
        "responses": metrics.responses(model, tokenizer, settings, samples),
        "fine_tune_seconds_per_step": seconds,
    }


def _train(
    stage: methods.Stage,
    batches: Iterator[dict[str, Tensor]],
    auxiliary: Iterator[dict[str, Tensor]],
    settings: Settings,
    steps: int,
    after: Any,
) -> tuple[list[dict[str, float]], float]:
    """Steps a stage; returns a trace of about 20 rows and the mean seconds of a step."""
    parameters = [p for p in stage.model.parameters() if p.requires_grad]
    stage.model.train()
    trace: list[dict[str, float]] = []
    seconds = 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        stage.optimizer.zero_grad()
        loss = stage.backward(batches, auxiliary)
        if settings.max_grad_norm:
            clip_grad_norm_(parameters, settings.max_grad_norm)
        stage.optimizer.step()
        seconds += time.perf_counter() - start
        if step % max(1, steps // 20) == 0 or step == steps:
            trace.append({"step": step, "alignment_loss": float(loss), **stage.diagnostics()})
        after(step)
    return trace, seconds / steps


def to_fine_tune(settings: Settings, base: Path, aligned: Path, method: str) -> Any:
    """The aligned model with what the user trains: all weights, the same LoRA, or a second one."""
    single_adapter = methods.METHODS[method].single_adapter
    if settings.trained == "full":
        return load_model(aligned, settings)
    model: Any = load_model(base, settings)
    with loading(aligned):
        model = PeftModel.from_pretrained(model, aligned, is_trainable=True)
    if settings.adapters == "single" or (settings.adapters == "paper" and single_adapter):
        return model
    return models.adapted(model.merge_and_unload(), settings)


def align_optimizer(model: Any, settings: Settings) -> Optimizer:
    """The base optimizer of the alignment stage."""
    return _optimizer(settings.align_optimizer, model, settings.align_lr, settings.weight_decay)


def _optimizer(name: str, model: Any, lr: float, weight_decay: float) -> Optimizer:
    """An optimizer of all that the model trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=0.9)
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def stream(
    examples: list[Example], tokenizer: Any, settings: Settings, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches of the examples."""
    encoded = lora_alignment.encode(examples, tokenizer, settings)
    return lora_alignment.batches(encoded, settings, seed)


def given_to(kind: type[methods.Stage], settings: Settings) -> dict[str, Any]:
    """Hyperparameters that are set for a stage, which its module's name stands for."""
    defaults = methods.hyperparameters(kind)
    given = settings.of_method(kind.__module__.rpartition(".")[2])
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no hyperparameter {', '.join(sorted(unknown))}; "
            f"it has {', '.join(defaults) or 'none'}"
        )
    return {key: type(defaults[key])(value) for key, value in given.items()}
