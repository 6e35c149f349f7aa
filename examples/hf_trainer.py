r"""Booster in transformers' Trainer: another class name and one more dataset.

    python examples/hf_trainer.py                                  # tiny model, seconds on a CPU
    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --alignment_set refusals.jsonl --harmful_set harmful.jsonl \
        --max_steps 2000 --output_dir aligned

A row of either set holds a `prompt`, with the model's template around it, and a `completion`. Every
flag of TrainingArguments works, such as --resume_from_checkpoint, which goes on as if nothing had
been interrupted. What is wrong with a set, a model or a checkpoint is said in one line, before any
training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, TrainingArguments

from inputs import (
    DATA,
    TOKENIZER,
    check_checkpoint,
    read_model,
    read_rows,
    text,
    tiny_llama,
    tokenized,
)
from torch_booster.integrations.transformers import BoosterArguments, BoosterTrainer


@dataclass
class Arguments:
    """What is aligned, on which data: name all three or none."""

    model: str = field(default="", metadata={"help": "hub name or folder (default: a tiny Llama)"})
    alignment_set: str = field(default="", metadata={"help": "jsonl: harmful prompt, refusal"})
    harmful_set: str = field(default="", metadata={"help": "jsonl: harmful prompt, harmful answer"})
    end_token: str = field(default="", metadata={"help": "ends an answer (default: tokenizer's)"})


def main(argv: list[str] | None = None) -> BoosterTrainer:
    """Aligns the model and returns the trainer."""
    kinds: Any = (Arguments, BoosterArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__)
    parser.set_defaults(output_dir="runs/hf_trainer", max_steps=20, logging_steps=5)
    parser.set_defaults(learning_rate=1e-3, use_cpu=not torch.cuda.is_available())
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
    args, booster_args, training_args = parser.parse_args_into_dataclasses(argv)

    files = [args.alignment_set, args.harmful_set]
    if args.model and all(files):
        model, tokenizer = read_model(args.model, args.end_token)
    elif args.model or any(files):
        parser.error("--model, --alignment_set and --harmful_set go together: name all or none")
    else:
        model, tokenizer = tiny_llama(64, training_args.seed), TOKENIZER
        files = [str(DATA / "alignment.jsonl"), str(DATA / "harmful.jsonl")]
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint:
        check_checkpoint(checkpoint)

    def prepared(row: Any) -> dict[str, list[int]]:
        prompt, completion = text(row, "prompt", "completion")
        return tokenized({"prompt": prompt, "completion": f" {completion.strip()}"}, tokenizer)

    alignment, harmful = (Dataset.from_list(read_rows(file, prepared)) for file in files)
    trainer = BoosterTrainer(
        model,
        training_args,
        DataCollatorForSeq2Seq(tokenizer),
        train_dataset=alignment,
        harmful_dataset=harmful,
        booster_args=booster_args,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    tokenizer.save_pretrained(training_args.output_dir)
    return trainer


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the checkpoints that were written stand
        raise SystemExit(130) from None
