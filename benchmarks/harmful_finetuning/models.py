"""Base models: small Llama, Gemma2 and Qwen2 that the project pretrains, or any causal LM."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import lora_alignment
import mini_language
from benchmarks.harmful_finetuning import data, language
from benchmarks.harmful_finetuning.settings import Settings
from lora_alignment import Report
from mini_language import Example

__all__ = ["adapted", "base_key", "config", "pretrain"]

VOCABULARY = 4_096
PRETRAINING = (
    *("architecture", "width", "layers", "pretrain_steps", "pretrain_batch", "pretrain_lr"),
    *("data_root", "template", "refusal", "answer_words", "branching", "max_length"),
)
"""Settings that decide what a pretrained base is."""


def config(settings: Settings, vocabulary: int) -> PreTrainedConfig:
    """Configuration of a small base model; special tokens are 0 (padding) and 1 (end of text)."""
    heads = max(1, settings.width // 32)
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": 2 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max(64, settings.max_length + settings.max_new_tokens),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if settings.architecture == "gemma2":
        head = settings.width // heads
        return Gemma2Config(**common, head_dim=head, query_pre_attn_scalar=head)
    if settings.architecture == "qwen2":
        return Qwen2Config(**common)
    return LlamaConfig(**common)


def base_key(settings: Settings, seed: int) -> Any:
    """What names the base model: its files, or all that decides how it is pretrained."""
    if settings.model:
        path = Path(settings.model)
        files = sorted(path.glob("*")) if path.is_dir() else []
        return settings.model, [(f.name, f.stat().st_size, f.stat().st_mtime) for f in files]
    values = {name: getattr(settings, name) for name in PRETRAINING}
    sources = [inspect.getsource(part) for part in (pretrain, config, language, mini_language)]
    return values, seed, sources, torch.__version__


def pretrain(settings: Settings, seed: int, folder: Path, report: Report) -> None:
    """Trains a small base model to answer every request and saves it with its tokenizer."""
    torch.manual_seed(seed)
    if settings.templated:
        tokenizer = language.build_tokenizer()
        stream = _templated_stream(settings, seed)
    else:
        examples = data.pretraining(settings)
        tokenizer = _trained_tokenizer(examples, settings)
        stream = _real_stream(examples, settings, seed)
    model: Any = AutoModelForCausalLM.from_config(config(settings, len(tokenizer)))
    model.to(settings.device).train()
    optimizer = AdamW(model.parameters(), lr=settings.pretrain_lr, fused=True)
    steps = settings.pretrain_steps
    schedule = OneCycleLR(optimizer, max_lr=settings.pretrain_lr, total_steps=steps)
    for step in range(1, steps + 1):
        batch = _encodable(next(stream), tokenizer, settings)
        optimizer.zero_grad()
        lora_alignment.backpropagate(model, lora_alignment.collate(batch, settings.device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(f"pretrain {settings.architecture}, seed {seed}", step, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _templated_stream(settings: Settings, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    shape = (settings.answer_words, settings.branching)
    while True:
        yield language.pretraining_batch(settings.pretrain_batch, rng, *shape)


def _real_stream(examples: list[Example], settings: Settings, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    while True:
        yield rng.sample(examples, min(settings.pretrain_batch, len(examples)))


def _encodable(examples: list[Example], tokenizer: Any, settings: Settings) -> list[Any]:
    """Encodes the examples whose prompts leave room for an answer."""
    room = settings.max_length
    encoded: list[Any] = []
    for example in examples:
        prompt = settings.template.replace("{prompt}", example.prompt)
        if len(tokenizer(prompt).input_ids) < room:
            encoded += lora_alignment.encode([example], tokenizer, settings)
    return encoded


def _trained_tokenizer(examples: list[Example], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the pretraining text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (settings.template.replace("{prompt}", p) + a for p, a in examples)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def adapted(model: Any, settings: Settings) -> Any:
    """The model with a new LoRA adapter, the only part of it that trains."""
    targets = settings.lora_targets
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
