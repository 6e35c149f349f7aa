"""Any causal language model and its tokenizer from a folder or the hub, and LoRA around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from benchmarks.harmful_finetuning.loading import loading
from benchmarks.harmful_finetuning.settings import Lora, Settings

GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")

Tell = Callable[[str, int, int], None]
"""Called with what is running, the steps done and the steps in all."""


def load_tokenizer(path: Path, settings: Settings) -> Any:
    """The model's tokenizer, ready to generate.

    Raises:
        ValueError: It can not be loaded, or does not know where an answer ends.
    """
    tokenizer = with_end(tokenizer_of(path), path, settings.text.end_token)
    tokenizer.padding_side = "left"
    return tokenizer


def tokenizer_of(path: str | Path) -> Any:
    """A model's tokenizer, whose ``model_max_length`` is no more than the model's context.

    Raises:
        ValueError: It can not be loaded.
    """
    with loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        # AutoTokenizer takes the class of the architecture even where a generic one was saved, and
        # Qwen2's splits a word-level vocabulary into letters.
        generic = get_tokenizer_config(path).get("tokenizer_class") in GENERIC_TOKENIZERS
        kind: Any = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer: Any = kind.from_pretrained(path, trust_remote_code=False)
        context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return tokenizer


def with_end(tokenizer: Any, path: str | Path, end_token: str = "") -> Any:
    """The tokenizer with a token that ends answers, and one that pads.

    Raises:
        ValueError: It has no such token.
    """
    if end_token:
        if end_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer of {path} has no token {end_token!r}; set end_token")
        tokenizer.eos_token = end_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} names no end of text; set end_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: Path, settings: Settings) -> Any:
    """A causal language model on the run's device."""
    model = model_of(path, dtype=getattr(torch, settings.base.dtype)).to(settings.device)
    if settings.base.autocast:
        # Around each forward pass alone: backward passes take the dtypes of theirs, and autocast,
        # which keeps its copies of float32 weights until it is left, sees those of each pass.
        kind = torch.device(settings.device).type
        model.forward = torch.autocast(kind, dtype=torch.bfloat16)(model.forward)
    return model


def model_of(path: str | Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A whole model from safetensors alone: nothing in its folder is unpickled or run.

    Raises:
        ValueError: It can not be loaded, or its files lack some weights.
    """
    with loading(path):
        model, info = kind.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if info["missing_keys"]:  # which would be random, without a word
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{path} lacks weights, such as {missing}; fetch the whole model again")
    return model


def adapted(model: Any, lora: Lora) -> Any:
    """The model with a new LoRA adapter, the only part of it that trains."""
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            target_modules="all-linear" if lora.targets == ("all-linear",) else list(lora.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
