"""Booster in ms-swift: a file for `--external_plugins`.

    # booster_plugin.py
    from torch_booster.integrations.ms_swift import serve
    from torch_booster.integrations.transformers import BoosterArguments

    serve(["harmful.jsonl"], BoosterArguments(lam=5.0, alpha=0.1))

    swift sft --external_plugins booster_plugin.py --model ... --dataset alignment.jsonl

`swift sft` then builds the trainer below in the place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift.dataset import (  # pyright: ignore[reportMissingImports]
    LazyLLMDataset,
    load_dataset,
)
from swift.trainers import (  # pyright: ignore[reportMissingImports]
    Seq2SeqTrainer,
    TrainerFactory,
)

from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin

__all__ = ["BoosterSeq2SeqTrainer", "serve"]


class BoosterSeq2SeqTrainer(
    BoosterMixin,
    Seq2SeqTrainer,  # pyright: ignore[reportUntypedBaseClass]
):
    """ms-swift's trainer for supervised fine-tuning on the Booster gradient."""

    harmful_paths: Sequence[str] = ()
    arguments: BoosterArguments | None = None

    def __init__(self, model: Any, args: Any, template: Any, *rest: Any, **kwargs: Any) -> None:
        if template.packing or template.padding_free:
            raise ValueError(
                "BoosterSeq2SeqTrainer does not serve packing and padding_free, with which "
                "harmful rows would be laid out otherwise. Switch both off."
            )
        super().__init__(model, args, template, *rest, booster_args=self.arguments, **kwargs)
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                "BoosterSeq2SeqTrainer does not serve DeepSpeed, under which ms-swift makes the "
                "optimizer in a way of its own. Use DDP or FSDP2."
            )
        if self.harmful_paths:
            rows, _ = load_dataset(list(self.harmful_paths), split_dataset_ratio=0.0)
            encode, seed = self.template.encode, self.args.data_seed
            self.harmful_dataset = LazyLLMDataset(rows, encode, strict=False, random_state=seed)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """ms-swift's callback would create the optimizer past the trainer's own method."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)


def serve(harmful: Sequence[str], booster_args: BoosterArguments | None = None) -> None:
    """Makes `swift sft` build the Booster trainer for causal language models.

    Args:
        harmful: Datasets of harmful prompts with harmful answers, as `--dataset` takes them.
        booster_args: λ, α and the rest.

    Raises:
        ValueError: There is no harmful dataset.
    """
    if not harmful:
        raise ValueError("harmful is empty. Name at least one dataset of harmful examples.")
    BoosterSeq2SeqTrainer.harmful_paths = [harmful] if isinstance(harmful, str) else [*harmful]
    BoosterSeq2SeqTrainer.arguments = booster_args
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.BoosterSeq2SeqTrainer"
