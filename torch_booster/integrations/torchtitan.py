"""Booster in torchtitan's trainer, on FSDP2 and tensor parallelism.

    class Aligned(BoosterTrainer): ...           # or BoosterTrainer itself
    config = BoosterTrainer.Config(..., harmful_dataloader=..., lam=5.0, alpha=0.1)
    config.build().train()

The optimizer in torchtitan's container is wrapped once the trainer is there, so that schedulers,
checkpoints and clipping go on as they are. A training step zeroes gradients first and then calls
`forward_backward_step` for each micro-batch; the harmful passes come before the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torchtitan.components.dataloader import (  # pyright: ignore[reportMissingImports]
    BaseDataLoader,
)
from torchtitan.components.loss import IGNORE_INDEX  # pyright: ignore[reportMissingImports]
from torchtitan.distributed import (  # pyright: ignore[reportMissingImports]
    utils as dist_utils,
)
from torchtitan.trainer import Trainer  # pyright: ignore[reportMissingImports]

from torch_booster.integrations.harmful_data import HarmfulStream, repeated
from torch_booster.optimizer import BoosterOptimizer

__all__ = ["BoosterTrainer"]


class BoosterTrainer(Trainer):  # pyright: ignore[reportUntypedBaseClass]
    """torchtitan's trainer on the Booster gradient.

    Raises:
        ValueError: There is no harmful_dataloader, pipeline parallelism or CUDA graphs are on, or
            several optimizers are in use.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # pyright: ignore[reportUntypedBaseClass]
        """The trainer's configuration, and Booster's."""

        harmful_dataloader: BaseDataLoader.Config = field(default_factory=BaseDataLoader.Config)
        """Of the harmful examples; for SFT, of the kind that `dataloader` is."""
        lam: float = 5.0
        alpha: float = 0.1
        norm: Literal["global", "tensor"] = "global"
        lam_warmup_steps: int = 0
        lam_delay_steps: int = 0
        every: int = 1
        trust_region: bool = False

    def __init__(self, config: Config) -> None:
        if type(config.harmful_dataloader) is BaseDataLoader.Config:  # which builds nothing
            raise ValueError(
                "harmful_dataloader is missing. Give the configuration of a loader of the kind "
                "that dataloader is, with the harmful examples."
            )
        super().__init__(config)
        self._begin(config)
        meshes = self.parallel_dims
        batch: Any = meshes.get_mesh("batch") if meshes.dp_enabled else None
        loader = config.harmful_dataloader.build(
            dp_world_size=1 if batch is None else batch.size(),
            dp_rank=0 if batch is None else batch.get_local_rank(),
            tokenizer=self.tokenizer,
            seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
            snapshot_every_n_steps=None,
        )
        self.harmful = _stream(loader)

    def _begin(self, config: Any) -> None:
        if self.parallel_dims.pp_enabled:
            raise ValueError(
                "BoosterTrainer does not serve pipeline parallelism, whose schedule owns the "
                "backward pass. Set parallelism.pipeline_parallel_degree=1."
            )
        if not config.training.disable_cuda_graphs:
            raise ValueError(
                "A CUDA graph writes to gradients that the harmful passes put aside. Set "
                "training.disable_cuda_graphs=True."
            )
        if len(self.optimizers.optimizers) != 1:
            raise ValueError(
                f"The container holds {len(self.optimizers.optimizers)} optimizers, whose "
                "parameters would not share the norm. Give all param_groups one optimizer_name."
            )
        (base,) = self.optimizers.optimizers
        self.booster = BoosterOptimizer(
            base,
            config.lam,
            config.alpha,
            norm=config.norm,
            lam_warmup_steps=config.lam_warmup_steps,
            lam_delay_steps=config.lam_delay_steps,
            every=config.every,
            trust_region=config.trust_region,
            module=self.model_parts[0],
        )
        self.optimizers.optimizers[0] = self.booster
        self.regularized = False

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """The trainer's own step, before whose first micro-batch the harmful passes come."""
        self.regularized = False
        super().train_step(data_iterator)

    def forward_backward_step(self, **kwargs: Any) -> Tensor:
        """The passes of a micro-batch of f, and before the first the regulariser."""
        if not self.regularized:
            self.regularized = True
            self._regularize(super().forward_backward_step)
        return super().forward_backward_step(**kwargs)

    def _regularize(self, run: Callable[..., Tensor]) -> None:
        if not self.booster.is_due():
            return
        inputs, labels = self.harmful.batch(self.booster.step_count // self.booster.every)
        meshes, device = self.parallel_dims, self.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        tokens = (labels != IGNORE_INDEX).sum().to(device)
        if meshes.dp_enabled:
            tokens = dist_utils.dist_sum_tensor(tokens, meshes.get_mesh("batch"))

        def closure() -> Tensor:
            # Each rank's loss is its part of the sum; its gradients are summed by FSDP.
            part = run(
                input_dict=dict(inputs), labels=labels.to(device), global_valid_tokens=tokens
            )
            if not meshes.dp_cp_enabled:
                return part
            return dist_utils.dist_sum_tensor(part.detach(), meshes.get_optional_mesh("loss"))

        seen = self.ntokens_seen  # counts what is aligned on
        try:
            self.booster.regularize(closure)
        finally:
            self.ntokens_seen = seen


def _stream(loader: Any) -> HarmfulStream:
    """The batches of a loader again and again."""
    empty = "harmful_dataloader has no batch. Give it more rows."
    return HarmfulStream(repeated(lambda _: loader, empty))
