r"""Booster in TRL's SFTTrainer: the mixin before the class, and one more dataset.

    python examples/trl_sft.py                                     # tiny model, seconds on a CPU
    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --alignment_set refusals.jsonl --harmful_set harmful.jsonl \
        --max_steps 2000 --output_dir aligned

The sets are of any kind that SFTTrainer takes: `messages`, `prompt` and `completion`, or `text`.
It applies the chat template, tokenises and packs both alike. Every flag of SFTConfig works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from inputs import DATA, TOKENIZER, check_checkpoint, read_model, read_rows, text, tiny_llama
from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin


class BoosterSFTTrainer(BoosterMixin, SFTTrainer):
    """SFTTrainer on the Booster gradient."""


@dataclass
class Arguments:
    """What is aligned, on which data: name all three or none."""

    model: str = field(default="", metadata={"help": "hub name or folder (default: a tiny Llama)"})
    alignment_set: str = field(default="", metadata={"help": "jsonl: harmful prompt, refusal"})
    harmful_set: str = field(default="", metadata={"help": "jsonl: harmful prompt, harmful answer"})
    end_token: str = field(default="", metadata={"help": "ends an answer (default: tokenizer's)"})


def checked(row: dict[str, Any], tokenizer: Any, longest: int) -> dict[str, Any]:
    """The row, if it is of a kind that the trainer takes and its prompt leaves room to answer."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, not {row!r}")
    kinds = (("messages",), ("prompt", "completion"), ("text",))
    kind = next((kind for kind in kinds if row.keys() >= set(kind)), None)
    if kind is None:
        raise ValueError(f"its columns are {list(row)}, expected one of {kinds}")
    for column in kind:
        if isinstance(row[column], list):
            if not row[column]:
                raise ValueError(f"its {column!r} is empty")
            for message in row[column]:
                text(message, "role", *([] if message.get("tool_calls") else ["content"]))
        else:
            text(row, column)
    prompt = row.get("prompt")
    if isinstance(prompt, str) and len(tokenizer(prompt).input_ids) >= longest:
        raise ValueError(f"its prompt fills the max_length of {longest}; shorten it")
    return row


def main(argv: list[str] | None = None) -> BoosterSFTTrainer:
    """Aligns the model and returns the trainer."""
    kinds: Any = (Arguments, BoosterArguments, SFTConfig)
    parser = HfArgumentParser(kinds, description=__doc__)
    parser.set_defaults(output_dir="runs/trl_sft", max_steps=20, logging_steps=5)
    parser.set_defaults(learning_rate=1e-3, use_cpu=not torch.cuda.is_available())
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
    # TRL's default is bf16, which would round part of the perturbation away.
    parser.set_defaults(bf16=False, gradient_checkpointing=False)
    args, booster_args, config = parser.parse_args_into_dataclasses(argv)

    files = [args.alignment_set, args.harmful_set]
    if args.model and all(files):
        model, tokenizer = read_model(args.model, args.end_token)
    elif args.model or any(files):
        parser.error("--model, --alignment_set and --harmful_set go together: name all or none")
    else:
        model, tokenizer = tiny_llama(64, config.seed), TOKENIZER
        files = [str(DATA / "alignment.jsonl"), str(DATA / "harmful.jsonl")]
    if config.resume_from_checkpoint:
        check_checkpoint(config.resume_from_checkpoint)
    context = tokenizer.model_max_length
    config.max_length = longest = min(config.max_length or context, context)

    def rows(file: str) -> Dataset:
        return Dataset.from_list(read_rows(file, lambda row: checked(row, tokenizer, longest)))

    trainer = BoosterSFTTrainer(
        model,
        config,
        train_dataset=rows(files[0]),
        harmful_dataset=rows(files[1]),
        processing_class=tokenizer,
        booster_args=booster_args,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the checkpoints that were written stand
        raise SystemExit(130) from None
