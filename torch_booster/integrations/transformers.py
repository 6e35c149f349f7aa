"""Booster in `transformers.Trainer` and in every trainer built on it.

The class name changes and one dataset is added:

    trainer = BoosterTrainer(model, args, train_dataset=alignment, harmful_dataset=harmful)

or, for another trainer, the mixin comes before its class:

    class BoosterSFTTrainer(BoosterMixin, SFTTrainer): ...
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from torch_booster.checks import NO_DEEPSPEED, checked, checked_count
from torch_booster.diagnostics import Diagnostics
from torch_booster.optimizer import BoosterOptimizer

__all__ = ["BoosterArguments", "BoosterMixin", "BoosterTrainer"]

# What a training step leaves behind in the trainer. TRL's trainers count tokens and average
# entropy and accuracy over the calls of compute_loss, which are to be the alignment ones only.
RECORDS = ("current_gradient_accumulation_steps", "_metrics", "_total_train_tokens")


@dataclass
class BoosterArguments:
    """Booster's own arguments, next to `TrainingArguments` in an `HfArgumentParser`."""

    lam: float = field(
        default=5.0,
        metadata={"help": "Regulariser intensity λ. Zero turns Booster off."},
    )
    alpha: float = field(
        default=0.1,
        metadata={"help": "Length α of the simulated harmful step, in units of the weights."},
    )
    per_device_harmful_batch_size: int | None = field(
        default=None,
        metadata={"help": "Harmful examples per device and step (default: a micro-batch's)."},
    )
    every: int = field(
        default=1,
        metadata={
            "help": "Regularise at every k-th step, k times as heavy: 1 + 2/k passes a step."
        },
    )
    lam_warmup_steps: int = field(
        default=0,
        metadata={"help": "Steps over which λ grows linearly from zero: against the easy way out."},
    )
    lam_delay_steps: int = field(
        default=0, metadata={"help": "Steps before that, in which λ is zero."}
    )
    norm: Literal["global", "tensor"] = field(
        default="global",
        metadata={
            "help": "One norm for the whole simulated step (the paper's), or one per tensor."
        },
    )
    self_check: bool = field(
        default=True,
        metadata={"help": "Look at the first harmful passes, by one more, whether they repeat."},
    )

    def __post_init__(self) -> None:
        """Refuses values that could only fail once the run has begun.

        Raises:
            TypeError: λ or α is no number.
            ValueError: λ or α is negative or not finite, the batch size or k is below 1, or
                the warm-up is negative.
        """
        checked("lam", self.lam)
        checked("alpha", self.alpha)
        size = self.per_device_harmful_batch_size
        if size is not None and size < 1:
            raise ValueError(
                f"per_device_harmful_batch_size is {size}. Pass at least 1, or nothing for the "
                "size of a micro-batch."
            )
        checked_count("every", self.every, 1)
        checked_count("lam_warmup_steps", self.lam_warmup_steps, 0)
        checked_count("lam_delay_steps", self.lam_delay_steps, 0)


class BoosterMixin(Trainer):
    """Makes any trainer step on the Booster gradient; place it before the trainer's class.

    1. The base optimizer, whichever way it was chosen, is wrapped in a `BoosterOptimizer`.
    2. Once per optimizer step, before the forward pass of its last micro-batch, the regulariser
       is added to `.grad`. Accumulation, clipping and the step then see the combined gradient.
       With `every=k` this happens at steps 0, k, 2k, ..., with k·λ in the place of λ; with
       `lam_warmup_steps=T` λ·min(1, t/T) stands for λ at step t, and step 0 is plain.
    3. A harmful pass is an ordinary training step of the trainer on a harmful batch: same loss,
       label smoothing, precision and collator, normalised by the batch's own token count.
    4. Harmful batch number n belongs to optimizer step n·k, whatever happened before. A resumed
       run therefore continues the stream of the unbroken one. Each data-parallel rank takes its
       own share.
    5. λ = 0 reads no harmful data and leaves the run of the trainer as it is, bit for bit.

    A map-style harmful dataset is shuffled anew in each epoch, seeded by `data_seed` (or `seed`).
    An iterable one is repeated in its own order; resuming reads past what has been used. TRL's
    trainers prepare (template, tokenise, pack) the harmful dataset as they do the training set.

    The records of the trainer gain the mean of each diagnostic over the steps since the last
    record, as they hold the mean loss: `harmful_loss` and its fellows in `Diagnostics`.

    Args:
        *args: Passed on to the trainer.
        harmful_dataset: Harmful examples with the columns of the training set. Their number is
            independent of the training set's.
        booster_args: λ, α and the harmful batch size.
        **kwargs: Passed on to the trainer.

    Raises:
        ValueError: The harmful dataset is missing or empty, or an optimizer is given that steps
            inside the backward pass.
        TypeError: An optimizer is given that is a `BoosterOptimizer` already.
        RuntimeError: The trainer runs under DeepSpeed, or under FSDP with gradient accumulation.
    """

    def __init__(
        self,
        *args: Any,
        harmful_dataset: Any,
        booster_args: BoosterArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if harmful_dataset is None:
            raise ValueError("harmful_dataset is None. Pass the examples to be resisted.")
        if not isinstance(harmful_dataset, IterableDataset) and len(harmful_dataset) == 0:
            raise ValueError("harmful_dataset is empty.")
        self.harmful_dataset = harmful_dataset
        self.booster_args = BoosterArguments() if booster_args is None else booster_args
        self._harmful_is_prepared = False
        self._start_over()
        super().__init__(*args, **kwargs)
        self._refuse_what_cannot_work()

    def _refuse_what_cannot_work(self) -> None:
        if self.is_deepspeed_enabled:
            raise RuntimeError(NO_DEEPSPEED)
        if self.is_fsdp_enabled and self.args.gradient_accumulation_steps > 1:
            raise RuntimeError(
                "FSDP keeps the gradients of earlier micro-batches unreduced, and the harmful "
                "passes would reduce them along with their own. Set "
                "gradient_accumulation_steps=1 and a larger batch, or use DDP."
            )
        if "lomo" in self.args.optim or "layerwise" in self.args.optim:
            raise ValueError(
                f"optim={self.args.optim!r} updates weights inside the backward pass, harmful "
                "passes included. Use an optimizer that steps after it."
            )
        if isinstance(_bare(self.optimizer), BoosterOptimizer):
            raise TypeError(
                "optimizers holds a BoosterOptimizer. Pass its base optimizer; λ and α come from "
                "booster_args, or from `booster_lam` and `booster_alpha` in the param groups."
            )

    def _start_over(self) -> None:
        self._harmful_batches: Iterator[Any] = iter(())
        self._harmful_turn: int | None = None  # the number of the stream's next batch
        self._diagnostics: Tensor | float = 0.0  # summed up since the last record
        self._diagnosed_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does, and lets go of the harmful stream and its workers."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._start_over()

    # ------------------------------------------------------------------ the step

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Creates the trainer's optimizer and wraps it."""
        optimizer = super().create_optimizer(model)
        if not isinstance(_bare(optimizer), BoosterOptimizer):  # it is in a second call of train
            args = self.booster_args
            optimizer = BoosterOptimizer(
                _bare(optimizer),
                args.lam,
                args.alpha,
                norm=args.norm,
                lam_warmup_steps=args.lam_warmup_steps,
                lam_delay_steps=args.lam_delay_steps,
                every=args.every,
                self_check=args.self_check,
                # A model is given where its optimizer has to wait for FSDP1, whose norm needs it.
                module=self.model if model is None else model,
            )
        self.optimizer = optimizer
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs forward and backward of a micro-batch, and before the last one the regulariser."""
        run = super().training_step
        # Before the last one and not before the first: only there does DDP reduce gradients, and
        # all ranks have to perturb in one direction.
        booster = _bare(self.optimizer)
        if self.accelerator.gradient_state.sync_gradients and booster.is_due():
            self._regularize(booster, partial(run, model))
        return run(model, inputs, num_items_in_batch)

    def _regularize(self, booster: BoosterOptimizer, run: Callable[..., Tensor]) -> None:
        batch = self._next_harmful_batch(booster.step_count // booster.every)
        num_items = self._get_num_items_in_batch([batch], self.args.device)
        booster._end_waiting()  # of a step that a loss scaler skipped; the trainer has zeroed it
        with _kept(self, RECORDS):
            self.current_gradient_accumulation_steps = 1  # h is not accumulated
            booster._regularize(lambda: run(batch, num_items))
        seen = booster.diagnostics
        assert seen is not None
        values = [v.to(self.args.device, torch.float32) for v in seen]
        self._diagnostics = self._diagnostics + torch.stack(values)
        self._diagnosed_steps += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the diagnostics where the trainer records its own training loss."""
        # The learning rate tells that record, made on all ranks at once, from any other.
        if "learning_rate" in logs and self._diagnosed_steps:
            mean: Any = self._diagnostics / self._diagnosed_steps
            mean = self.accelerator.reduce(mean, reduction="mean")
            means = dict(zip(Diagnostics._fields, mean.tolist(), strict=True))
            _bare(self.optimizer)._warn_of(means)
            if self.accelerator.scaler is not None:  # these two are of the scaled loss
                del means["harmful_grad_norm"], means["drop_ratio"]
            logs = {**logs, **means}
            self._diagnostics, self._diagnosed_steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ the harmful stream

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's trainers prepare the training set with this, before any evaluation set."""
        prepare: Callable[..., Any] = super()._prepare_dataset  # type: ignore[misc]
        if not self._harmful_is_prepared:
            self.harmful_dataset = prepare(self.harmful_dataset, *args, **kwargs)
            self._harmful_is_prepared = True
        return prepare(dataset, *args, **kwargs)

    def _next_harmful_batch(self, turn: int) -> Any:
        if turn != self._harmful_turn:
            self._harmful_batches = self._harmful_batches_from(turn)
        batch = next(self._harmful_batches)
        self._harmful_turn = turn + 1
        return batch

    def _harmful_batches_from(self, turn: int) -> Iterator[Any]:
        """This rank's batches from number `turn` on, without end."""
        args, data = self.args, self.harmful_dataset
        alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # ranks on one batch
        rank, ranks = args.process_index // alike, args.world_size // alike
        size = self.booster_args.per_device_harmful_batch_size or self._train_batch_size
        order = None
        if not isinstance(data, IterableDataset):
            seed = args.seed if args.data_seed is None else args.data_seed
            order = _shuffled(len(data), seed, count(turn * size * ranks + rank, ranks))
        loader = DataLoader[Any](
            data,
            batch_size=size,
            sampler=order,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "harmful"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            # A loader draws a seed, and the global random state is the trainer's.
            generator=torch.Generator().manual_seed(args.seed),
        )
        if order is not None:
            return iter(loader)
        batches = islice(_repeated(loader), rank, None, ranks)
        with _random_state_kept():  # of the checkpoint, which has these draws behind it
            for _ in islice(batches, turn):
                pass
        return batches


class BoosterTrainer(BoosterMixin, Trainer):
    """`transformers.Trainer` on the Booster gradient; its rules and arguments are the mixin's."""


def _bare(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _shuffled(size: int, seed: int, positions: Iterable[int]) -> Iterator[int]:
    """What stands at these positions of an endless row of shuffles of `range(size)`."""

    @lru_cache(maxsize=1)
    def shuffle(epoch: int) -> Any:
        return np.random.default_rng((seed, epoch)).permutation(size)

    for position in positions:
        epoch, index = divmod(position, size)
        yield int(shuffle(epoch)[index])


def _repeated(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of epoch after epoch, of which the dataset is told where it asks to be."""
    for epoch in count():
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("harmful_dataset is empty.")


@contextmanager
def _random_state_kept() -> Generator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def _kept(owner: Any, names: Sequence[str]) -> Generator[None]:
    """Puts attributes back as they were, where the owner has them."""
    values = {name: copy.deepcopy(vars(owner)[name]) for name in names if name in vars(owner)}
    try:
        yield
    finally:
        vars(owner).update(values)
