r"""Booster in transformers' Trainer: another class name and one more dataset.

    python examples/hf_trainer.py                                  # tiny model, seconds on a CPU
    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --alignment_set refusals.jsonl --harmful_set harmful.jsonl \
        --max_steps 2000 --output_dir aligned

Both sets hold a `prompt` and an `answer` in each row. Every flag of TrainingArguments works, such
as --resume_from_checkpoint, which goes on as if nothing had been interrupted.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    TrainingArguments,
)

import mini_language
from torch_booster.integrations.transformers import BoosterArguments, BoosterTrainer


@dataclass
class Arguments:
    """What is aligned, on which data."""

    model: str = field(default="", metadata={"help": "hub name or folder (default: a tiny Llama)"})
    alignment_set: str = field(default="", metadata={"help": "json: harmful prompt, refusal"})
    harmful_set: str = field(default="", metadata={"help": "json: harmful prompt, harmful answer"})
    template: str = field(
        default=mini_language.TEMPLATE, metadata={"help": "text around each prompt"}
    )


def tokenized(row: dict[str, str], tokenizer: Any, template: str) -> dict[str, list[int]]:
    """Prompt and answer as one sequence; only the answer carries a loss."""
    prompt = tokenizer(template.format(prompt=row["prompt"]))["input_ids"]
    answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main(argv: list[str] | None = None) -> BoosterTrainer:
    """Aligns the model and returns the trainer."""
    parser = HfArgumentParser(
        [Arguments, BoosterArguments, TrainingArguments],  # pyright: ignore[reportArgumentType]
        description=__doc__,
    )
    parser.set_defaults(
        output_dir="runs/hf_trainer",
        max_steps=20,
        logging_steps=5,
        learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    args, booster_args, training_args = parser.parse_args_into_dataclasses(argv)

    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        alignment = load_dataset("json", data_files=args.alignment_set, split="train")
        harmful = load_dataset("json", data_files=args.harmful_set, split="train")
    else:
        tokenizer = mini_language.build_tokenizer()
        model = mini_language.build_model(tokenizer)
        rows = [example._asdict() for example in mini_language.mischief(random.Random(0))]
        alignment = Dataset.from_list([{**row, "answer": mini_language.REFUSAL} for row in rows])
        harmful = Dataset.from_list(rows)

    prepare = partial(tokenized, tokenizer=tokenizer, template=args.template)
    trainer = BoosterTrainer(
        model,
        training_args,
        DataCollatorForSeq2Seq(tokenizer),
        train_dataset=alignment.map(prepare, remove_columns=alignment.column_names),
        harmful_dataset=harmful.map(prepare, remove_columns=harmful.column_names),
        booster_args=booster_args,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    tokenizer.save_pretrained(training_args.output_dir)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
