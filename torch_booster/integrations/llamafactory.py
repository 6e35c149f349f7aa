"""Booster in LLaMA-Factory's v1 trainer: an optimizer by its name, and a callback.

    optim_config:
      name: booster
      lr: 1.0e-4
      lam: 5.0
      alpha: 0.1

    trainer = SFTTrainer(args=..., model=..., renderer=..., train_dataset=...)
    trainer.callback_handler.add_callback(BoosterCallback(trainer, DataEngine("harmful.yaml")))
    trainer.fit()

Importing this module makes the name known. The older trainers are `transformers.Trainer`s:
`class BoosterSeq2SeqTrainer(BoosterMixin, CustomSeq2SeqTrainer)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from llamafactory.v1.accelerator.helper import ReduceOp  # pyright: ignore[reportMissingImports]
from llamafactory.v1.accelerator.interface import (  # pyright: ignore[reportMissingImports]
    DistributedInterface,
)
from llamafactory.v1.core.utils.batching import (  # pyright: ignore[reportMissingImports]
    BatchGenerator,
)
from llamafactory.v1.plugins.trainer_plugins.optimizer import (  # pyright: ignore[reportMissingImports]
    OptimizerPlugin,
)
from llamafactory.v1.utils.callbacks import (  # pyright: ignore[reportMissingImports]
    TrainerCallback,
)
from llamafactory.v1.utils.helper import (  # pyright: ignore[reportMissingImports]
    compute_valid_tokens,
)
from torch import Tensor, nn

from torch_booster.integrations.harmful_data import HarmfulStream, repeated
from torch_booster.optimizer import BoosterOptimizer

__all__ = ["BoosterCallback", "booster"]

COUNTS = ("lam_warmup_steps", "lam_delay_steps", "every")


@OptimizerPlugin("booster").register()  # pyright: ignore[reportUntypedFunctionDecorator]
def booster(model: nn.Module, config: Mapping[str, Any]) -> BoosterOptimizer:
    """AdamW with a BoosterOptimizer around it, by the keys of `optim_config`.

    Args:
        model: The model, sharded already where it is to be.
        config: `lr`; AdamW's `weight_decay`; and what `BoosterOptimizer` takes.

    Raises:
        ValueError: `lr` is missing, or a key is unknown.
    """
    given = {key: value for key, value in config.items() if key != "name"}
    if "lr" not in given:
        raise ValueError("optim_config has no lr. The trainer's learning_rate is not told to it.")
    # YAML reads 1e-4 as text.
    lr, decay = float(given.pop("lr")), float(given.pop("weight_decay", 0.01))
    told: dict[str, Any] = {key: float(given.pop(key)) for key in ("lam", "alpha") if key in given}
    told |= {key: given.pop(key) for key in ("norm", "trust_region", *COUNTS) if key in given}
    if given:
        raise ValueError(
            f"optim_config has unknown keys: {', '.join(given)}. Known are lr, weight_decay, lam, "
            f"alpha, norm, trust_region, {', '.join(COUNTS)}."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
    return BoosterOptimizer(base, **told, module=model)


class BoosterCallback(TrainerCallback):  # pyright: ignore[reportUntypedBaseClass]
    """Adds the regulariser before the first micro-batch of each step.

    A resumed run goes on in the harmful stream where it was.

    Args:
        trainer: The trainer, whose loss is h's loss too.
        harmful_dataset: Harmful examples, as `DataEngine` makes them.
        micro_batch_size: Harmful examples of a rank and step (default: a micro-batch's).

    Raises:
        TypeError: The trainer's optimizer is not the one named "booster".
        RuntimeError: The trainer runs under DeepSpeed or with context parallelism.
    """

    def __init__(
        self, trainer: Any, harmful_dataset: Any, micro_batch_size: int | None = None
    ) -> None:
        if trainer._deepspeed_engine is not None:
            raise RuntimeError(
                "BoosterCallback does not serve DeepSpeed, whose engine steps by itself. Use fsdp2."
            )
        distribution = trainer.args.dist_config
        if distribution is not None and distribution.get("cp_size", 1) > 1:
            raise RuntimeError("BoosterCallback does not serve context parallelism: set cp_size=1.")
        if not isinstance(trainer.optimizer, BoosterOptimizer):
            raise TypeError(
                f"The trainer's optimizer is a {type(trainer.optimizer).__name__}. Set "
                "optim_config: {name: booster, lr: ...}."
            )
        self.trainer = trainer
        generator = BatchGenerator(
            dataset=harmful_dataset,
            renderer=trainer.renderer,
            micro_batch_size=micro_batch_size or trainer.args.micro_batch_size,
            cutoff_len=trainer.args.cutoff_len,
            seed=trainer.args.seed,
        )

        def epoch(number: int) -> Iterator[Any]:
            """This rank's micro-batches."""
            generator.set_epoch(number)
            return chain.from_iterable(generator)

        empty = (
            "harmful_dataset has fewer rows than a batch on all ranks. Give more rows, or a "
            "smaller micro_batch_size."
        )
        self.harmful = HarmfulStream(repeated(epoch, empty))

    def on_step_begin(self, args: Any, state: Any, **kwargs: Any) -> None:
        """Runs the harmful passes, where the step to come has a regulariser."""
        optimizer = self.trainer.optimizer
        if not optimizer.is_due():
            return
        # The last one again where the trainer skipped a step, whose gradients were not finite.
        batch = self.harmful.batch(optimizer.step_count // optimizer.every)
        ranks = DistributedInterface()
        own = compute_valid_tokens([batch])
        everywhere = ranks.all_reduce(own, op=ReduceOp.SUM)

        def closure() -> Tensor:
            # As the trainer weighs its micro-batches: by tokens, over all ranks.
            loss = self.trainer.compute_loss(batch)
            loss = loss * own * self.trainer.dp_size / (everywhere + 1e-6)
            loss.backward()
            return loss

        optimizer.regularize(closure)
