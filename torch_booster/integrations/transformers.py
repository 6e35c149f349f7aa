"""Booster in `transformers.Trainer` and in every trainer built on it.

The class name changes and one dataset is added:

    trainer = BoosterTrainer(model, args, train_dataset=alignment, harmful_dataset=harmful)

or, for another trainer, the mixin comes before its class:

    class BoosterSFTTrainer(BoosterMixin, SFTTrainer): ...
"""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import count, islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, Sampler

from torch_booster.checks import checked, checked_count, checked_flag, checked_norm
from torch_booster.diagnostics import Diagnostics
from torch_booster.hyperparameters import ALPHA, LAM, REGION, STEP, Hyperparameters
from torch_booster.integrations import needs
from torch_booster.integrations.harmful_data import (
    checked_dataset,
    checked_first_batch,
    checked_labels,
    first_rows,
    repeated,
    rows_dropped,
)
from torch_booster.optimizer import BoosterOptimizer

with needs("transformers"):
    import numpy as np
    from accelerate.optimizer import AcceleratedOptimizer  # pyright: ignore[reportMissingTypeStubs]
    from transformers import Trainer, TrainingArguments

    from torch_booster.integrations.accelerate import AcceleratedEngine, booster_of, loss_scale

__all__ = ["BoosterArguments", "BoosterMixin", "BoosterTrainer"]

# What a training step leaves behind in the trainer. TRL's trainers count tokens and average
# entropy and accuracy over the calls of compute_loss, which are to be the alignment ones only;
# ms-swift's keep theirs in custom_metrics.
RECORDS = (
    "current_gradient_accumulation_steps",
    "_metrics",
    "_stored_metrics",
    "_total_train_tokens",
    "custom_metrics",
)

# TRL's trainers whose training step is more than a function of its batch, and why. Forks and
# subclasses (A2PO has one name, Unsloth's end in these) are known by the end of their names.
NOT_A_FUNCTION_OF_ITS_BATCH = {
    "GRPOTrainer": "generates completions, and steps through a buffer of them",
    "GMPOTrainer": "generates completions, and steps through a buffer of them",
    "RLOOTrainer": "generates completions, and steps through a buffer of them",
    "A2POTrainer": "generates completions within its steps",
    "OnlineDPOTrainer": "generates completions within its steps",
    "DistillationTrainer": "generates completions, and steps through a buffer of them",
    "GOLDTrainer": "generates completions, and steps through a buffer of them",
    "IWOPDTrainer": "generates completions, and steps through a buffer of them",
    "SDFTTrainer": "generates completions, and steps through a buffer of them",
    "SDPOTrainer": "generates completions, and steps through a buffer of them",
}

# Methods of a trainer that the mixin has to come before, and what would happen otherwise.
MUST_COME_AFTER = {
    "__init__": "does not know its arguments",
    "training_step": "its training_step would be left out of the harmful passes",
}

# Rows of a stream that are looked at before a run.
SAMPLE = 256

# In a checkpoint, beside the optimizer's state: the arguments that it was made with.
ARGUMENTS_NAME = "booster_args.json"


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
    trust_region: bool = field(
        default=False,
        metadata={
            "help": "Halve α where the harmful loss falls by less than a quarter of what its "
            "gradient promises, and let it grow back."
        },
    )
    perturb_merged: bool = field(
        default=False,
        metadata={
            "help": "Simulate the harmful step in the weights that PEFT's adapter will be merged "
            "into, in the place of the adapter's own."
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
            ValueError: λ or α is negative or not finite, the batch size or k is below 1, the
                warm-up is negative, or there is no such norm.
        """
        checked("lam", self.lam)
        checked("alpha", self.alpha)
        size = self.per_device_harmful_batch_size
        if size is not None and size < 1:
            raise ValueError(
                f"per_device_harmful_batch_size is {size}. Pass at least 1, or nothing for the "
                "size of a micro-batch."
            )
        checked_norm("norm", self.norm)
        checked_flag("trust_region", self.trust_region)
        checked_count("every", self.every, 1)
        checked_count("lam_warmup_steps", self.lam_warmup_steps, 0)
        checked_count("lam_delay_steps", self.lam_delay_steps, 0)


class BoosterMixin(Trainer):
    """Makes any trainer step on the Booster gradient; place it before the trainer's class.

    1. The base optimizer, whichever way it was chosen, is wrapped in a `BoosterOptimizer`.
    2. Once per optimizer step, before the forward pass of its last micro-batch, the regulariser
       is added to `.grad`. Accumulation, clipping and the step then see the combined gradient.
       Under DeepSpeed an `AcceleratedEngine` stands for both: the harmful passes run before the
       first micro-batch, and the regulariser joins the gradient in the engine's step.
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

    λ, α and the rest follow `booster_args` at every step: a callback may change them, and a
    hyperparameter search may name them. A param group's own `booster_lam` and `booster_alpha` win
    over them, and both win over what a checkpoint holds, of which a resumed run tells.

    Args:
        *args: Passed on to the trainer.
        harmful_dataset: Harmful examples with the columns of the training set. Their number is
            independent of the training set's. Where something else builds the trainer, leave it
            out and set `trainer.harmful_dataset` before `train()`.
        booster_args: λ, α and the harmful batch size.
        harmful_data_collator: Makes the harmful batches (default: the trainer's collator).
        **kwargs: Passed on to the trainer.

    Attributes:
        in_harmful_pass: Whether a harmful pass is running, for a `compute_loss` that counts.

    Raises:
        ValueError: The harmful dataset is missing, empty, or cannot be used in the training set's
            place, or an optimizer is given that steps inside the backward pass.
        TypeError: The harmful dataset is no dataset, an optimizer is given that is a
            `BoosterOptimizer` already, the mixin comes after the trainer's class, or that class's
            training step is more than a function of its batch (it generates, or has a buffer).
        RuntimeError: The trainer runs under FSDP with gradient accumulation, or, at the start of
            the run, under DeepSpeed with a feature that is not supported.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a trainer that comes before the mixin and has a part in what the mixin does."""
        super().__init_subclass__(**kwargs)
        for before in cls.__mro__[: cls.__mro__.index(BoosterMixin)]:
            if issubclass(before, BoosterMixin):
                continue
            for name, why in MUST_COME_AFTER.items():
                if name in vars(before):
                    raise TypeError(
                        f"{before.__name__} comes before BoosterMixin, and {why}. Turn them "
                        f"round: class {cls.__name__}(BoosterMixin, {before.__name__})."
                    )

    def __init__(
        self,
        *args: Any,
        harmful_dataset: Any = ...,
        booster_args: BoosterArguments | None = None,
        harmful_data_collator: Callable[[list[Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for kind in self._trainers():
            for name, why in NOT_A_FUNCTION_OF_ITS_BATCH.items():
                if kind.endswith(name):
                    raise TypeError(
                        f"BoosterMixin cannot serve {kind}, which {why}: the two harmful passes "
                        "would see different batches, and the alignment pass a harmful one. Align "
                        "with SFTTrainer or DPOTrainer, before or afterwards."
                    )
        self.booster_args = BoosterArguments() if booster_args is None else booster_args
        self.harmful_data_collator = harmful_data_collator
        self.in_harmful_pass = False
        self._preparations: list[Callable[[Any], Any]] = []  # of TRL, for a set that is given late
        self._harmful_dataset = ... if harmful_dataset is ... else checked_dataset(harmful_dataset)
        self._start_over()
        super().__init__(*args, **kwargs)
        self._refuse_what_cannot_work()
        if self._harmful_dataset is not ...:
            self._refuse_bad_data()

    def _trainers(self) -> list[str]:
        """The names of the classes that the mixin was put before."""
        return [kind.__name__ for kind in type(self).__mro__ if not issubclass(kind, BoosterMixin)]

    def _refuse_what_cannot_work(self) -> None:
        if self.is_deepspeed_enabled and self.optimizer is not None:
            raise ValueError(
                "Under DeepSpeed the trainer drops an optimizer that it is given, and makes one of "
                "its own. Choose it by args.optim, or override create_optimizer."
            )
        if self.is_fsdp_enabled and self.args.gradient_accumulation_steps > 1:
            raise RuntimeError(
                "FSDP keeps the gradients of earlier micro-batches unreduced, and the harmful "
                "passes would reduce them along with their own. Set "
                "gradient_accumulation_steps=1 and a larger batch, or use DDP."
            )
        self._refuse_sharded_weights(self.booster_args)
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
        if getattr(self, "calculate_KL", False):
            raise ValueError(
                "KTOTrainer pairs each example with its neighbour to estimate a KL term, and the "
                "harmful examples are shuffled. Set loss_type='apo_zero_unpaired', which has none."
            )
        if "GKDTrainer" in self._trainers() and getattr(self, "lmbda", 0.0) > 0.0:
            raise ValueError(
                "GKDTrainer generates completions within its steps where lmbda is not 0, so that "
                "the two harmful passes would see different batches. Set lmbda=0.0."
            )

    def _refuse_sharded_weights(self, args: BoosterArguments) -> None:
        if args.perturb_merged and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "perturb_merged needs the whole gradient of frozen weights, which DeepSpeed and "
                "FSDP shard. Set perturb_merged=False, or use DDP."
            )

    def _perturbed(self, args: BoosterArguments, model: nn.Module) -> Iterable[Tensor] | None:
        """The weights that the simulated step moves, where they are not those that train."""
        if not _moves_merged(args):
            return None
        from torch_booster.integrations.peft import MergedOffsets  # peft is not everyone's

        return MergedOffsets(model)

    def _start_over(self) -> None:
        self._harmful_batches: Iterator[Any] = iter(())
        self._harmful_turn: int | None = None  # the number of the stream's next batch
        self._diagnostics: Tensor | float = 0.0  # summed up since the last record
        self._diagnosed_steps = 0
        self._seen: tuple[int, Tensor] | None = None  # the step to come, and its diagnostics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does, and lets go of the harmful stream and its workers."""
        if self._harmful_dataset is ... and self.booster_args.lam > 0:
            raise ValueError(
                "There is no harmful_dataset. Pass it to the trainer, or set "
                "trainer.harmful_dataset before train()."
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            self._start_over()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Begins the run, which `auto_find_batch_size` may do several times."""
        self._start_over()
        if isinstance(booster := _bare(self.optimizer), BoosterOptimizer):
            for group in booster._groups():
                group[STEP] = 0
                group.pop(REGION, None)
        return super()._inner_training_loop(*args, **kwargs)

    # ------------------------------------------------------------------ the step

    def _booster(self) -> BoosterOptimizer | AcceleratedEngine | None:
        """What takes the Booster steps, once it is there."""
        if self.is_deepspeed_enabled:
            engine: Any = self.accelerator.deepspeed_engine_wrapped
            return engine if isinstance(engine, AcceleratedEngine) else None
        optimizer = _bare(self.optimizer)
        return optimizer if isinstance(optimizer, BoosterOptimizer) else None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Creates the trainer's optimizer and wraps it, but under DeepSpeed."""
        # Some trainers take no model, which only FSDP1 gives.
        given: Any = (
            super().create_optimizer() if model is None else super().create_optimizer(model)
        )
        optimizer: Any = self.optimizer if given is None else given
        wrapped = isinstance(_bare(optimizer), BoosterOptimizer)  # it is in a second call of train
        if not wrapped and not self.is_deepspeed_enabled:
            # A model is given where its optimizer has to wait for FSDP1, whose norm needs it.
            module: Any = self.model if model is None else model
            optimizer = BoosterOptimizer(
                _bare(optimizer),
                **self._hyperparameters(),
                perturbed=self._perturbed(self.booster_args, module),
                module=module,
            )
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Creates the trainer's scheduler, and takes the engine that DeepSpeed has made by now."""
        if self.is_deepspeed_enabled and optimizer is None:  # else it is being made
            engine = AcceleratedEngine(self.accelerator, **self._hyperparameters())
            self._given = _given(engine)
        return super().create_scheduler(num_training_steps, optimizer)

    def _hyperparameters(self) -> dict[str, Any]:
        """`booster_args`, as they are from now on followed."""
        args = self._followed = replace(self.booster_args)
        self._refuse_sharded_weights(args)
        told = asdict(args)
        del told["per_device_harmful_batch_size"], told["perturb_merged"]
        return told

    def _follow_arguments(self, booster: Hyperparameters) -> None:
        """Brings what has changed in `booster_args` into force."""
        old, new = self._followed, self.booster_args
        if new == old:
            return
        new = replace(new)  # which checks the values
        self._refuse_sharded_weights(new)
        if isinstance(booster, BoosterOptimizer) and _moves_merged(old) != _moves_merged(new):
            booster.perturbed = self._perturbed(new, cast(nn.Module, self.model))
        self._followed = new
        for name in ("norm", "lam_warmup_steps", "lam_delay_steps", "every", "trust_region"):
            if getattr(new, name) != getattr(old, name):
                setattr(booster, name, getattr(new, name))
        for key, before, after in ((LAM, old.lam, new.lam), (ALPHA, old.alpha, new.alpha)):
            booster._defaults[key] = float(after)
            for group in booster._groups():
                if group[key] == before:  # any other value is the group's own
                    group[key] = float(after)
        if new.per_device_harmful_batch_size != old.per_device_harmful_batch_size:
            self._harmful_turn = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs forward and backward of a micro-batch, and before the last one the regulariser."""
        run = super().training_step
        optimizer: Any = self.optimizer
        booster = self._booster() if self.is_deepspeed_enabled else booster_of(optimizer)
        if booster is None:
            raise RuntimeError(
                f"create_scheduler of {type(self).__name__} does not call "
                "super().create_scheduler, which takes the DeepSpeed engine for Booster. Do."
            )
        if isinstance(booster, AcceleratedEngine):
            # Before the first one: a reduction drops what ZeRO has accumulated.
            its_turn = booster.begins
        else:
            # Before the last one and not before the first: only there does DDP reduce gradients,
            # and all ranks have to perturb in one direction.
            its_turn = self.accelerator.gradient_state.sync_gradients
        if its_turn:
            self._follow_arguments(booster)
            if booster.is_due():
                self._regularize(booster, partial(run, model))
        return run(model, inputs, num_items_in_batch)

    def _regularize(
        self, booster: BoosterOptimizer | AcceleratedEngine, run: Callable[..., Tensor]
    ) -> None:
        batch = self._next_harmful_batch(booster.step_count // booster.every)
        num_items = self._get_num_items_in_batch([batch], self.args.device)
        passes: Callable[[Callable[[], Tensor]], Any] = booster._regularize
        if isinstance(booster, BoosterOptimizer):
            booster._end_waiting()  # of a step that a scaler skipped; the trainer has zeroed it
            passes = partial(passes, loss_scale=loss_scale(booster, self.accelerator))

        def closure() -> Tensor:
            return run(copy.deepcopy(batch), num_items)  # a loss may edit its batch in place

        with _kept(self, (*RECORDS, "in_harmful_pass")):
            self.in_harmful_pass = True
            self.current_gradient_accumulation_steps = 1  # h is not accumulated
            passes(closure)
        seen = booster.diagnostics
        assert seen is not None
        self._count_what_happened(booster)
        values = [v.to(self.args.device, torch.float32) for v in seen]
        self._seen = booster.step_count, torch.stack(values)

    def _count_what_happened(self, booster: Hyperparameters) -> None:
        """Adds to the record what a regulariser saw, if its step was taken and not skipped."""
        if self._seen is not None and booster.step_count > self._seen[0]:
            self._diagnostics = self._diagnostics + self._seen[1]
            self._diagnosed_steps += 1
            self._seen = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the diagnostics where the trainer records its own training loss."""
        booster = self._booster()
        if booster is not None:
            self._count_what_happened(booster)
        # The learning rate tells that record, made on all ranks at once, from any other.
        if booster is not None and "learning_rate" in logs and self._diagnosed_steps:
            mean: Any = self._diagnostics / self._diagnosed_steps
            mean = self.accelerator.reduce(mean, reduction="mean")
            means = dict(zip(Diagnostics._fields, mean.tolist(), strict=True))
            booster._warn_of(means)
            if self.accelerator.scaler is not None:  # these two are of the scaled loss
                del means["harmful_grad_norm"], means["drop_ratio"]
            logs = {**logs, **means}
            self._diagnostics, self._diagnosed_steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ which values are in force

    def _hp_search_setup(self, trial: Any) -> None:
        """Takes from a trial what `booster_args` has, and leaves the trainer the rest."""
        if self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
            return
        asks = self.hp_search_backend.value == "optuna"
        values: dict[str, Any] = self.hp_space(trial) if asks else dict(trial)
        ours = {f.name: getattr(self.booster_args, f.name) for f in fields(self.booster_args)}
        rest = {name: value for name, value in values.items() if name not in ours}
        given = {
            # bool("False") is true: what is on or off is taken as it is.
            name: value if isinstance(ours[name], bool | None) else type(ours[name])(value)
            for name, value in values.items()
            if name in ours
        }
        self.booster_args = replace(self.booster_args, **given)
        space = self.hp_space
        try:
            self.hp_space = lambda _: rest  # pyright: ignore[reportUnknownLambdaType]
            super()._hp_search_setup(trial if asks else rest)
        finally:
            self.hp_space, self._trial = space, trial

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves the optimizer as the trainer does, and the arguments beside it."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            with open(os.path.join(output_dir, ARGUMENTS_NAME), "w", encoding="utf-8") as file:
                json.dump(asdict(self.booster_args), file, indent=2)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the optimizer as the trainer does; λ and α are what this run was given."""
        booster = self._booster()
        if checkpoint is None or booster is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # An engine has loaded its checkpoint by now.
        given = self._given if isinstance(booster, AcceleratedEngine) else _given(booster)
        super()._load_optimizer_and_scheduler(checkpoint)
        changed: dict[str, tuple[Any, Any]] = {}
        for group, values in zip(booster._groups(), given, strict=True):
            group[STEP] = group[STEP] or self.state.global_step  # of a run without Booster
            for key, value in values.items():
                if group[key] != value:
                    changed[key.removeprefix("booster_")] = group[key], value
            group.update(values)
        path = os.path.join(checkpoint, ARGUMENTS_NAME)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                saved = {f.name: f.default for f in fields(self.booster_args)} | json.load(file)
            now = asdict(self.booster_args)
            changed |= {
                name: (value, now[name])
                for name, value in saved.items()
                if name in now and name not in ("lam", "alpha", "self_check") and value != now[name]
            }
        if changed:
            told = ", ".join(f"{name}={new} ({old})" for name, (old, new) in changed.items())
            warnings.warn(
                f"The run goes on with other values than those of its checkpoint (in brackets): "
                f"{told}. Pass the old ones in booster_args to go on as before.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ the harmful stream

    @property
    def harmful_dataset(self) -> Any:
        """The harmful examples, prepared; those set here are prepared as the training set was."""
        return None if self._harmful_dataset is ... else self._harmful_dataset

    @harmful_dataset.setter
    def harmful_dataset(self, dataset: Any) -> None:
        self._harmful_dataset = checked_dataset(dataset)
        for prepare in self._preparations:
            self._harmful_dataset = prepare(self._harmful_dataset)
        self._harmful_turn = None
        self._refuse_bad_data()

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's trainers prepare the training set with this, before any evaluation set."""
        prepare: Callable[..., Any] = super()._prepare_dataset  # type: ignore[misc]
        if not self._preparations:
            ours = [_HARMFUL if x == "train" else x for x in args]

            def prepare_harmful(harmful: Any) -> Any:
                with self._prepared_by_its_own_format(harmful, [*args, *kwargs.values()]):
                    prepared = _told_of(partial(prepare, harmful, *ours, **kwargs))
                    if hasattr(harmful, "take") and not hasattr(harmful, "__len__"):
                        # Of a stream without end, a filter that drops all would never return.
                        start = prepare(harmful.take(SAMPLE), *ours, **kwargs)
                        checked_dataset(first_rows(start, 1), prepared=True)
                packs = any(x is True for x in args) or kwargs.get("packing", False)
                return prepared if packs else rows_dropped(harmful, prepared)

            self._preparations.append(prepare_harmful)
            if self._harmful_dataset is not ...:
                self._harmful_dataset = prepare_harmful(self._harmful_dataset)
        return prepare(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """TRL's preference trainers add the reference's log-probabilities with this."""
        compute: Callable[..., Any] = super()._precompute_ref_logps  # type: ignore[misc]
        if name == "train":

            def add_to_harmful(harmful: Any) -> Any:
                return _told_of(partial(compute, harmful, _HARMFUL, *args, **kwargs))

            self._preparations.append(add_to_harmful)
            if self._harmful_dataset is not ...:
                self._harmful_dataset = add_to_harmful(self._harmful_dataset)
        return compute(dataset, name, *args, **kwargs)

    @contextmanager
    def _prepared_by_its_own_format(self, harmful: Any, given: list[Any]) -> Generator[None]:
        """SFTTrainer decides by the training set's columns whether prompts carry a loss."""
        kept = getattr(self, "completion_only_loss", None)
        args = next((x for x in given if isinstance(x, TrainingArguments)), None)
        if kept is not None and getattr(args, "completion_only_loss", kept) is None:
            (row,) = first_rows(harmful, 1)
            self.completion_only_loss = "prompt" in row and "completion" in row
        try:
            yield
        finally:
            if kept is not None:
                self.completion_only_loss = kept

    def _refuse_bad_data(self) -> None:
        """Looks at a first harmful batch beside one of the training set."""
        data = checked_dataset(self._harmful_dataset, prepared=True)
        if self.booster_args.lam == 0:  # which reads no harmful data
            return
        with _random_state_kept():
            harmful = first_rows(data, self._harmful_batch_size())
            alignment = first_rows(self.train_dataset, len(harmful))
            ours, theirs = (
                self._get_collator_with_removed_columns(collate, "training")
                for collate in (self._harmful_collator(), self.data_collator)
            )
            checked_first_batch(harmful, alignment, ours, theirs, type(self).__name__)

    def _harmful_collator(self) -> Callable[[list[Any]], Any]:
        own = self.harmful_data_collator
        return self.data_collator if own is None else own

    def _harmful_batch_size(self) -> int:
        size = self.booster_args.per_device_harmful_batch_size
        if size is None:
            return self._train_batch_size
        # auto_find_batch_size has made the micro-batches smaller, since memory did not suffice.
        return max(1, size * self._train_batch_size // self.args.train_batch_size)

    def _next_harmful_batch(self, turn: int) -> Any:
        if turn != self._harmful_turn:
            self._harmful_batches = self._harmful_batches_from(turn)
        batch = next(self._harmful_batches)
        checked_labels(batch)
        self._harmful_turn = turn + 1
        return batch

    def get_harmful_dataloader(self) -> DataLoader[Any]:
        """The harmful batches; override it for a sampler or a loader of another kind.

        A loader of one epoch is repeated, and its batches are dealt out to the ranks. The one made
        here is for this rank, and does not end where the dataset has a length.
        """
        args, data = self.args, self._harmful_dataset
        if data is ...:
            raise ValueError("There is no harmful_dataset. Set trainer.harmful_dataset.")
        size = self._harmful_batch_size()
        sampler = None
        if not isinstance(data, IterableDataset):
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler = _Shuffles(len(data), seed, size, *self._rank())
        return DataLoader[Any](
            data,
            batch_size=size,
            sampler=sampler,
            collate_fn=self._get_collator_with_removed_columns(self._harmful_collator(), "harmful"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            # A loader draws a seed, and the global random state is the trainer's.
            generator=torch.Generator().manual_seed(args.seed),
        )

    def _rank(self) -> tuple[int, int]:
        """This rank and their number, counting those that share one batch once."""
        alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return self.args.process_index // alike, self.args.world_size // alike

    def _harmful_batches_from(self, turn: int) -> Iterator[Any]:
        """This rank's batches from number `turn` on, without end."""
        loader: Any = self.get_harmful_dataloader()
        sampler: Any = getattr(loader, "sampler", None)
        if isinstance(sampler, _Shuffles):
            sampler.turn = turn
            return iter(loader)
        dataset: Any = getattr(loader, "dataset", None)

        def epoch(number: int) -> Any:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(number)
            return loader

        batches = repeated(epoch, "harmful_dataset is empty.")
        batches = islice(batches, self._rank()[0], None, self._rank()[1])
        with _random_state_kept():  # of the checkpoint, which has these draws behind it
            for _ in islice(batches, turn):
                pass
        return batches


class BoosterTrainer(BoosterMixin, Trainer):
    """`transformers.Trainer` on the Booster gradient; its rules and arguments are the mixin's."""


def _moves_merged(args: BoosterArguments) -> bool:
    return args.perturb_merged and args.lam > 0


def _bare(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _given(booster: Hyperparameters) -> list[dict[str, float]]:
    """λ and α of each group."""
    return [{key: group[key] for key in (LAM, ALPHA)} for group in booster._groups()]


def _told_of(prepare: Callable[[], Any]) -> Any:
    """Names the harmful dataset where its preparation fails."""
    try:
        return prepare()
    except Exception as error:
        raise ValueError(
            f"harmful_dataset cannot be prepared as the training set is ({type(error).__name__}: "
            f"{error}). Give it the training set's columns and type."
        ) from error


_HARMFUL = "harmful"  # what TRL calls the set in its progress bars


class _Shuffles(Sampler[int]):
    """One rank's part of an endless row of shuffles, from batch number `turn` on."""

    def __init__(self, rows: int, seed: int, batch_size: int, rank: int, ranks: int) -> None:
        self.rows, self.seed, self.batch_size = rows, seed, batch_size
        self.rank, self.ranks, self.turn = rank, ranks, 0

    def __iter__(self) -> Iterator[int]:
        @lru_cache(maxsize=1)
        def shuffle(epoch: int) -> Any:
            return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

        for position in count(self.turn * self.batch_size * self.ranks + self.rank, self.ranks):
            epoch, index = divmod(position, self.rows)
            yield int(shuffle(epoch)[index])


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
