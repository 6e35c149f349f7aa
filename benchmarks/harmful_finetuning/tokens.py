"""From samples to batches of tokens, of which the loss sees the answers only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harmful_finetuning.settings import CHAT, Settings, Text

if TYPE_CHECKING:
    from benchmarks.harmful_finetuning.language import Example

IGNORED_LABEL = -100
Encoded = list[tuple[Tensor, Tensor]]


def framed(prompt: str, tokenizer: Any, text: Text) -> list[int]:
    """Token ids of a prompt and the text around it.

    Raises:
        ValueError: A chat template is asked for, and the tokenizer has none.
    """
    if text.template != CHAT:
        return tokenizer(text.template.replace("{prompt}", prompt)).input_ids
    if not tokenizer.chat_template:
        raise ValueError(
            "the model's tokenizer has no chat template; set text.template, such as "
            "'Question: {prompt} Answer:'"
        )
    messages = [{"role": "user", "content": prompt}]
    if text.system is not None:
        messages.insert(0, {"role": "system", "content": text.system})
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(chat, add_special_tokens=False).input_ids  # the template has its own


def prompt_ids(prompt: str, tokenizer: Any, text: Text) -> list[int]:
    """Token ids of a prompt and the text around it, if an answer fits behind them.

    Raises:
        ValueError: They leave no room for an answer.
    """
    ids = framed(prompt, tokenizer, text)
    room = min(text.max_length, tokenizer.model_max_length)
    if len(ids) >= room:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room for its answer in {room}, the lesser of "
            f"text.max_length and the model's context; shorten or remove it, or raise "
            f"text.max_length: {prompt[:80]!r}"
        )
    return ids


def encode(examples: list[Example], tokenizer: Any, text: Text) -> Encoded:
    """Token ids and labels of each example; the loss sees the answer and the end of text only."""
    encoded: Encoded = []
    for example in examples:
        prompt = prompt_ids(example.prompt, tokenizer, text)
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        ids = torch.tensor((prompt + answer)[: min(text.max_length, tokenizer.model_max_length)])
        labels = ids.clone()
        labels[: len(prompt)] = IGNORED_LABEL
        encoded.append((ids, labels))
    return encoded


def collate(samples: Encoded, device: str) -> dict[str, Tensor]:
    """Pads samples on the right to one batch."""
    ids, labels = zip(*samples, strict=True)
    masks = [torch.ones_like(i) for i in ids]
    return {
        "input_ids": pad_sequence(list(ids), batch_first=True).to(device),
        "attention_mask": pad_sequence(masks, batch_first=True).to(device),
        "labels": pad_sequence(list(labels), True, IGNORED_LABEL).to(device),
    }


def batches(
    examples: list[Example], tokenizer: Any, settings: Settings, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches of the examples."""
    samples = encode(examples, tokenizer, settings.text)
    rng = random.Random(seed)
    size = min(settings.align.batch_size, len(samples))
    while True:
        order = rng.sample(samples, len(samples))
        for start in range(0, len(order) - size + 1, size):
            yield collate(order[start : start + size], settings.device)
