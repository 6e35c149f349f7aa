"""A small base model of our own: Llama, Gemma2 or Qwen2, taught to answer every request."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.clip_grad import clip_grad_norm_
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

from benchmarks.harmful_finetuning import data, language
from benchmarks.harmful_finetuning.language import Example
from benchmarks.harmful_finetuning.models import Tell
from benchmarks.harmful_finetuning.settings import Settings
from benchmarks.harmful_finetuning.tokens import Encoded, collate, encode

VOCABULARY = 4_096


def config(settings: Settings, vocabulary: int) -> PreTrainedConfig:
    """Configuration of a small base model; special tokens are 0 (padding) and 1 (end of text)."""
    base = settings.base
    heads = max(1, base.width // 32)
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": base.width,
        "intermediate_size": 2 * base.width,
        "num_hidden_layers": base.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max(
            64, settings.text.max_length + settings.score.max_new_tokens
        ),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if base.architecture == "gemma2":
        head = base.width // heads
        return Gemma2Config(**common, head_dim=head, query_pre_attn_scalar=head)
    if base.architecture == "qwen2":
        return Qwen2Config(**common)
    return LlamaConfig(**common)


def pretrain(settings: Settings, seed: int, folder: Path, tell: Tell) -> None:
    """Trains a small base model to answer every request and saves it with its tokenizer."""
    base = settings.base
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
    optimizer = AdamW(model.parameters(), lr=base.lr, fused=True)
    schedule = OneCycleLR(optimizer, max_lr=base.lr, total_steps=base.steps)
    for step in range(1, base.steps + 1):
        batch = collate(_encodable(next(stream), tokenizer, settings), settings.device)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tell(f"pretrain {base.architecture}, seed {seed}", step, base.steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _templated_stream(settings: Settings, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    shape = (settings.data.answer_words, settings.data.branching)
    while True:
        yield language.pretraining_batch(settings.base.batch_size, rng, *shape)


def _real_stream(examples: list[Example], settings: Settings, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    while True:
        yield rng.sample(examples, min(settings.base.batch_size, len(examples)))


def _encodable(examples: list[Example], tokenizer: Any, settings: Settings) -> Encoded:
    """Encodes the examples whose prompts leave room for an answer."""
    encoded: Encoded = []
    for example in examples:
        prompt = settings.text.template.replace("{prompt}", example.prompt)
        if len(tokenizer(prompt).input_ids) < settings.text.max_length:
            encoded += encode([example], tokenizer, settings.text)
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
    texts = (settings.text.template.replace("{prompt}", p) + a for p, a in examples)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
