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

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

import mini_language
from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin


class BoosterSFTTrainer(BoosterMixin, SFTTrainer):
    """SFTTrainer on the Booster gradient."""


@dataclass
class Arguments:
    """What is aligned, on which data."""

    model: str = field(default="", metadata={"help": "hub name or folder (default: a tiny Llama)"})
    alignment_set: str = field(default="", metadata={"help": "json: harmful prompt, refusal"})
    harmful_set: str = field(default="", metadata={"help": "json: harmful prompt, harmful answer"})


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

    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        alignment = load_dataset("json", data_files=args.alignment_set, split="train")
        harmful = load_dataset("json", data_files=args.harmful_set, split="train")
    else:
        tokenizer = mini_language.build_tokenizer()
        model = mini_language.build_model(tokenizer)
        rows = [
            {"prompt": mini_language.TEMPLATE.format(prompt=prompt), "completion": f" {answer}"}
            for prompt, answer in mini_language.mischief(random.Random(0))
        ]
        refusal = f" {mini_language.REFUSAL}"
        alignment = Dataset.from_list([{**row, "completion": refusal} for row in rows])
        harmful = Dataset.from_list(rows)

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
