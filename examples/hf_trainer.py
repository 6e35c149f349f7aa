r"""Booster in transformers' Trainer: another class name and one more dataset.

    python examples/hf_trainer.py                                  # tiny model, seconds on a CPU
    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --alignment_set refusals.jsonl --harmful_set harmful.jsonl \
        --max_steps 2000 --output_dir aligned

Both sets hold a `prompt` and an `answer` in each row. Every flag of TrainingArguments works, such
as --resume_from_checkpoint, which goes on as if nothing had been interrupted. What is wrong with a
set, a model or a checkpoint is said in one line, before any training.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

import mini_language
from lora_alignment import (
    answered,
    examples_of,
    loading,
    model_of,
    read_json,
    read_rows,
    tokenizer_of,
    with_end,
)
from mini_language import Example
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
    end_token: str = field(
        default="", metadata={"help": "token that ends an answer (default: the tokenizer's)"}
    )


def tokenized(row: dict[str, str], tokenizer: Any, template: str) -> dict[str, list[int]]:
    """Prompt and answer as one sequence, cut at the context; only the answer carries a loss.

    Raises:
        ValueError: The prompt alone fills the context.
    """
    context = tokenizer.model_max_length
    prompt = tokenizer(template.replace("{prompt}", row["prompt"]))["input_ids"]
    if len(prompt) >= context:
        raise ValueError(
            f"its prompt of {len(prompt)} tokens fills the model's context of {context}; shorten "
            "or remove it"
        )
    answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + answer
    return {"input_ids": (prompt + answer)[:context], "labels": labels[:context]}


def read_model(args: Any) -> tuple[Any, Any]:
    """The model and the tokenizer that are named, or the tiny ones.

    Raises:
        ValueError: A file is named without the others, or a model can not be loaded.
    """
    named = [bool(value) for value in (args.model, args.alignment_set, args.harmful_set)]
    if any(named) and not all(named):
        raise ValueError("--model, --alignment_set and --harmful_set go together; name all or none")
    if args.model:
        return model_of(args.model), with_end(tokenizer_of(args.model), args.model, args.end_token)
    tokenizer = mini_language.build_tokenizer()
    return mini_language.build_model(tokenizer), tokenizer


def check_checkpoint(folder: str | None) -> None:
    """Raises ValueError for a checkpoint of the Trainer that is not whole, and unpickles nothing.

    The Trainer would go on without an optimizer's state that is missing, and end in a traceback
    where a file is cut off. In all other respects it reads checkpoints as this does.
    """
    if not folder:
        return
    path = Path(folder)
    read_json(path / "trainer_state.json")
    for pattern in ("*model*", "optimizer*", "scheduler*"):
        if not any(path.glob(pattern)):
            raise ValueError(f"{path} holds no {pattern}; go on from an earlier checkpoint")
    for file in sorted(f for suffix in ("pt", "pth", "bin") for f in path.glob(f"*.{suffix}")):
        if file.name != "training_args.bin":  # which nobody reads
            with loading(file), safe_globals():
                torch.load(file, map_location="meta", weights_only=True)
    for file in sorted(path.glob("*.safetensors")):
        with loading(file), safe_open(file, "pt"):
            pass


def read_sets(args: Arguments, prepare: Callable[[dict[str, str]], Any]) -> list[Dataset]:
    """Refusals and harmful answers as they are named, or those of the tiny language.

    Raises:
        ValueError: Names the file, the row and the remedy.
    """
    if "{prompt}" not in args.template:
        raise ValueError("--template must contain {prompt}")

    def fits(example: Example) -> Example:
        prepare(answered(example)._asdict())
        return example

    if args.model:
        files = (args.alignment_set, args.harmful_set)
        sets = [examples_of(read_rows(Path(f)), "prompt", "answer", fits) for f in files]
    else:
        mischief = mini_language.mischief(random.Random(0))
        sets = [[Example(e.prompt, mini_language.REFUSAL) for e in mischief], mischief]
    return [Dataset.from_list([example._asdict() for example in rows]) for rows in sets]


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
    try:
        check_checkpoint(training_args.resume_from_checkpoint)
        model, tokenizer = read_model(args)
        prepare = partial(tokenized, tokenizer=tokenizer, template=args.template)
        alignment, harmful = read_sets(args, prepare)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")

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
