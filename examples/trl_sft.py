r"""Booster in TRL's SFTTrainer: the mixin before the class, and one more dataset.

    python examples/trl_sft.py                                     # tiny model, seconds on a CPU
    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --alignment_set refusals.jsonl --harmful_set harmful.jsonl \
        --max_steps 2000 --output_dir aligned

The sets are of any kind that SFTTrainer takes: `messages`, `prompt` and `completion`, or `text`.
It applies the chat template, tokenises and packs both alike. Every flag of SFTConfig works.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_trainer import check_checkpoint, read_model
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

import mini_language
from lora_alignment import Row, cell, loading, read_rows
from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin


class BoosterSFTTrainer(BoosterMixin, SFTTrainer):
    """SFTTrainer on the Booster gradient."""


@dataclass
class Arguments:
    """What is aligned, on which data."""

    model: str = field(default="", metadata={"help": "hub name or folder (default: a tiny Llama)"})
    alignment_set: str = field(default="", metadata={"help": "json: harmful prompt, refusal"})
    harmful_set: str = field(default="", metadata={"help": "json: harmful prompt, harmful answer"})
    end_token: str = field(
        default="", metadata={"help": "token that ends an answer (default: the tokenizer's)"}
    )


KINDS = (("messages",), ("prompt", "completion"), ("text",))


def read_conversations(file: str, tokenizer: Any, longest: int) -> Dataset:
    """The rows of a json file, all of the same kind.

    Raises:
        ValueError: Names the file, the row and the remedy.
    """
    rows = read_rows(Path(file))
    where, first = rows[0]
    kind = next((kind for kind in KINDS if first.keys() >= set(kind)), None)
    if kind is None:
        raise ValueError(
            f"{where}: its columns are {list(first)}, expected messages, prompt and completion, or "
            "text; rename them"
        )
    for where, row in rows:
        try:
            for column in kind:
                check_text(row, column)
            prompt = row.get("prompt")
            if isinstance(prompt, str) and len(tokenizer(prompt).input_ids) >= longest:
                raise ValueError(f"its prompt fills the max_length of {longest}; shorten it")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    with loading(file):
        return Dataset.from_list([row for _, row in rows])


def check_text(row: Row, column: str) -> None:
    """Raises ValueError unless a column holds text or messages."""
    messages = row.get(column)
    if not isinstance(messages, list):
        texts = [cell(row, column)]
    elif all(isinstance(message, dict) for message in messages):
        texts = [cell(m, "role") for m in messages]
        texts += [cell(m, "content") for m in messages if not m.get("tool_calls")]
    else:
        raise ValueError(f"its {column!r} holds no messages; mend or remove the row")
    if not texts or not all(texts):
        raise ValueError(f"its {column!r} is empty; fill it in or remove the row")


def read_sets(args: Arguments, tokenizer: Any, longest: int) -> list[Dataset]:
    """Refusals and harmful answers as they are named, or those of the tiny language."""
    if args.model:
        files = (args.alignment_set, args.harmful_set)
        return [read_conversations(file, tokenizer, longest) for file in files]
    rows = [
        {"prompt": mini_language.TEMPLATE.format(prompt=prompt), "completion": f" {answer}"}
        for prompt, answer in mini_language.mischief(random.Random(0))
    ]
    refusal = f" {mini_language.REFUSAL}"
    refusals = [{**row, "completion": refusal} for row in rows]
    return [Dataset.from_list(refusals), Dataset.from_list(rows)]


def main(argv: list[str] | None = None) -> BoosterSFTTrainer:
    """Aligns the model and returns the trainer."""
    parser = HfArgumentParser(
        [Arguments, BoosterArguments, SFTConfig],  # pyright: ignore[reportArgumentType]
        description=__doc__,
    )
    parser.set_defaults(
        output_dir="runs/trl_sft",
        max_steps=20,
        logging_steps=5,
        learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=False,  # which TRL defaults to, and which would round part of the perturbation away
        gradient_checkpointing=False,
    )
    args, booster_args, sft_config = parser.parse_args_into_dataclasses(argv)

    try:
        check_checkpoint(sft_config.resume_from_checkpoint)
        model, tokenizer = read_model(args)
        context = tokenizer.model_max_length
        sft_config.max_length = min(sft_config.max_length or context, context)
        alignment, harmful = read_sets(args, tokenizer, sft_config.max_length)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")

    trainer = BoosterSFTTrainer(
        model,
        sft_config,
        train_dataset=alignment,
        harmful_dataset=harmful,
        processing_class=tokenizer,
        booster_args=booster_args,
    )
    trainer.train(resume_from_checkpoint=sft_config.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
