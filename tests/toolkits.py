"""Stand-ins of training toolkits, which are too large to install for the tests.

Where a toolkit is installed its own classes are used. Elsewhere these take their place, with the
same names and signatures, and as much behind them as the integrations touch. They are written from
what the toolkits do; a test names in its identifier which of the two it ran on.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def stand_in(patch: pytest.MonkeyPatch, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts modules in the place of a toolkit's, and the packages above them."""
    for name, contents in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in modules or path != name:
                if path not in sys.modules:
                    patch.setitem(sys.modules, path, ModuleType(path))
                continue
            module = sys.modules.get(path) or ModuleType(path)
            vars(module).update(contents)
            patch.setitem(sys.modules, path, module)
    for name in modules:
        above, _, own = name.rpartition(".")
        if above:
            setattr(sys.modules[above], own, sys.modules[name])


class TokenModel(nn.Module):
    """Scores of the next token, given the last one: the smallest language model."""

    def __init__(self, vocabulary: int = 12, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)
        self.config = SimpleNamespace(_attn_implementation="eager", model_type="tokens")

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(torch.tanh(self.embedding(input_ids))))


# ------------------------------------------------------------------------- LLaMA-Factory, v1


def llamafactory(patch: pytest.MonkeyPatch) -> None:
    """What LLaMA-Factory 0.9.5 has under `llamafactory.v1`."""

    class ReduceOp(enum.Enum):
        SUM = "sum"

    class DistributedInterface:
        current_device = torch.device("cpu")

        def all_reduce(self, data: Any, op: ReduceOp = ReduceOp.SUM) -> Any:
            return data

    class BatchGenerator:
        def __init__(
            self,
            dataset: Any,
            renderer: Any,
            micro_batch_size: int = 1,
            global_batch_size: int | None = None,
            cutoff_len: int = 2048,
            batching_workers: int = 0,
            batching_strategy: Any = None,
            pin_memory: bool = True,
            drop_last: bool = True,
            seed: int = 42,
        ) -> None:
            self.rows, self.render, self.seed = dataset, renderer.process_samples, seed
            self.size, self.epoch = micro_batch_size, 0
            self.micro = (global_batch_size or micro_batch_size) // micro_batch_size

        def __len__(self) -> int:
            return len(self.rows) // (self.size * self.micro)

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
            order = torch.Generator().manual_seed(self.seed + self.epoch)
            rows = torch.randperm(len(self.rows), generator=order).tolist()
            whole = self.size * self.micro
            for start in range(0, len(rows) - whole + 1, whole):
                chosen = self.render([self.rows[i] for i in rows[start : start + whole]])
                yield [
                    {k: torch.tensor([row[k] for row in part]) for k in part[0]}
                    for part in (chosen[i : i + self.size] for i in range(0, whole, self.size))
                ]

    class OptimizerPlugin:
        known: ClassVar[dict[str, Callable[..., Any]]] = {}

        def __init__(self, name: str) -> None:
            self.name = name

        def register(self) -> Callable[..., Any]:
            def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
                self.known[self.name] = function
                return function

            return decorator

        def __call__(self, *args: Any) -> Any:
            return self.known[self.name](*args)

    class TrainerCallback:
        def on_step_begin(self, args: Any, state: Any, **kwargs: Any) -> None:
            pass

    class CallbackHandler:
        def __init__(self) -> None:
            self.callbacks: list[TrainerCallback] = []

        def add_callback(self, callback: TrainerCallback) -> None:
            self.callbacks.append(callback)

    def compute_valid_tokens(batches: list[Any]) -> int:
        return sum(int((batch["labels"] != -100).sum()) for batch in batches)

    class SFTTrainer:
        _deepspeed_engine = None
        device = torch.device("cpu")
        dp_size = 1

        def __init__(
            self, args: Any, model: Any, renderer: Any, train_dataset: Any, callbacks: Any = None
        ) -> None:
            self.args, self.model, self.renderer = args, model, renderer
            self.batches = BatchGenerator(
                train_dataset,
                renderer,
                args.micro_batch_size,
                args.global_batch_size,
                seed=args.seed,
            )
            self.optimizer = OptimizerPlugin(args.optim_config.name)(model, args.optim_config)
            self.callback_handler = CallbackHandler()

        def compute_loss(self, batch: Any) -> Tensor:
            scores = self.model(batch["input_ids"]).logits[:, :-1]
            weights = batch["loss_weights"][:, 1:]
            losses = nn.functional.cross_entropy(
                scores.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
            )
            return (losses * weights).sum() / (weights.sum() + 1e-6)

        def fit(self) -> None:
            step, epoch = 0, 0
            while step < self.args.max_steps:
                self.batches.set_epoch(epoch)
                for micro_batches in self.batches:
                    step += 1
                    for callback in self.callback_handler.callbacks:
                        callback.on_step_begin(self.args, None)
                    tokens = compute_valid_tokens(micro_batches)
                    for batch in micro_batches:
                        share = compute_valid_tokens([batch]) / (tokens + 1e-6)
                        (self.compute_loss(batch) * share).backward()
                    params = self.model.parameters()
                    norm = nn.utils.clip_grad_norm_(params, self.args.max_grad_norm)
                    if norm.isfinite():
                        self.optimizer.step()
                    self.optimizer.zero_grad()
                    if step == self.args.max_steps:
                        return
                epoch += 1

    v1 = "llamafactory.v1"
    stand_in(
        patch,
        {
            f"{v1}.accelerator.helper": {"ReduceOp": ReduceOp},
            f"{v1}.accelerator.interface": {"DistributedInterface": DistributedInterface},
            f"{v1}.core.utils.batching": {"BatchGenerator": BatchGenerator},
            f"{v1}.plugins.trainer_plugins.optimizer": {"OptimizerPlugin": OptimizerPlugin},
            f"{v1}.utils.callbacks": {"TrainerCallback": TrainerCallback},
            f"{v1}.utils.helper": {"compute_valid_tokens": compute_valid_tokens},
            f"{v1}.trainers.sft_trainer": {"SFTTrainer": SFTTrainer},
            f"{v1}.config": {"BatchingStrategy": SimpleNamespace(NORMAL="normal")},
        },
    )


# ------------------------------------------------------------------------- torchtitan


def torchtitan(patch: pytest.MonkeyPatch) -> None:
    """What torchtitan 0.3.0 has of its trainer, without pipelines, meshes and metrics."""

    class BaseDataLoader:
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config:
            pass

    class Trainer:
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config:
            pass

        def train_step(self, data_iterator: Iterator[Any]) -> None:
            self.optimizers.zero_grad(set_to_none=self.config.training.disable_cuda_graphs)
            groups = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
            tokens = torch.stack([(labels != -100).sum() for _, labels in groups]).sum()
            for inputs, labels in groups:
                self.forward_backward_step(
                    input_dict=inputs, labels=labels, global_valid_tokens=tokens
                )
            params = [p for part in self.model_parts for p in part.parameters()]
            nn.utils.clip_grad_norm_(params, self.config.training.max_norm)
            self.optimizers.step()
            self.lr_schedulers.step()

        def forward_backward_step(
            self, *, input_dict: Any, labels: Tensor, global_valid_tokens: Tensor
        ) -> Tensor:
            self.ntokens_seen += labels.numel()
            loss, _ = self.loss_fn(
                self.model_parts[0](input_dict["input"]), labels, global_valid_tokens
            )
            loss.backward()
            return loss

    class OptimizersContainer(torch.optim.Optimizer):
        def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
            self.optimizers = optimizers

        def step(self, closure: None = None) -> None:
            for optimizer in self.optimizers:
                optimizer.step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=set_to_none)

    stand_in(
        patch,
        {
            "torchtitan.components.dataloader": {"BaseDataLoader": BaseDataLoader},
            "torchtitan.components.loss": {"IGNORE_INDEX": -100},
            "torchtitan.components.optimizer": {"OptimizersContainer": OptimizersContainer},
            "torchtitan.distributed.utils": {},
            "torchtitan.trainer": {"Trainer": Trainer},
        },
    )


# ------------------------------------------------------------------------- Axolotl


def axolotl(patch: pytest.MonkeyPatch) -> None:
    """What Axolotl 0.19.0 gives a plugin, and calls of it."""
    from transformers import Trainer

    class BasePlugin:
        pass

    class AxolotlTrainer(Trainer):
        def __init__(
            self,
            *args: Any,
            bench_data_collator: Any = None,
            eval_data_collator: Any = None,
            dataset_tags: Any = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)

        def create_optimizer(self, model: Any = None) -> Any:
            return super().create_optimizer(model=model)

    class DictDefault(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            return self.get(name)

        def to_dict(self) -> dict[str, Any]:
            return dict(self)

    def prepare_datasets(cfg: Any, tokenizer: Any, processor: Any = None) -> Any:
        rows = [row for dataset in cfg.datasets for row in dataset["path"]]
        return rows, None, len(rows), []

    stand_in(
        patch,
        {
            "axolotl.integrations.base": {"BasePlugin": BasePlugin},
            "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
            "axolotl.utils.data": {"prepare_datasets": prepare_datasets},
            "axolotl.utils.dict": {"DictDefault": DictDefault},
        },
    )


# ------------------------------------------------------------------------- ms-swift


def ms_swift(patch: pytest.MonkeyPatch) -> None:
    """What ms-swift 4.6.0 has of its trainer for supervised fine-tuning."""
    from transformers import Trainer

    class OptimizerCallback:
        def __init__(self, args: Any, trainer: Any) -> None:
            self.args, self.trainer = args, trainer

        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            self.trainer.optimizer = self.create_optimizer()
            self.create_scheduler(num_training_steps, self.trainer.optimizer)

        def create_optimizer(self, model: Any = None) -> Any:
            return Trainer.create_optimizer(self.trainer)

        def create_scheduler(self, num_training_steps: int, optimizer: Any) -> Any:
            return Trainer.create_scheduler(self.trainer, num_training_steps, optimizer)

    class Seq2SeqTrainer(Trainer):
        def __init__(
            self, model: Any, args: Any, template: Any, train_dataset: Any, **kwargs: Any
        ) -> None:
            self.template = template
            self.optimizer_callback = OptimizerCallback(args, self)
            self.custom_metrics = {"train": {"passes": []}}
            collate = template.data_collator
            super().__init__(
                model, args, train_dataset=train_dataset, data_collator=collate, **kwargs
            )

        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            self.optimizer_callback.create_optimizer_and_scheduler(num_training_steps)

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = self.optimizer_callback.create_optimizer(model=model)
            groups = self.optimizer.param_groups
            self.optimizer.param_groups = [g for g in groups if len(g["params"]) > 0]
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            callback = self.optimizer_callback
            self.lr_scheduler = callback.create_scheduler(num_training_steps, optimizer)
            return self.lr_scheduler

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.custom_metrics["train"]["passes"].append(len(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class TrainerFactory:
        TRAINER_MAPPING: ClassVar[dict[str, str]] = {"causal_lm": "swift.trainers.Seq2SeqTrainer"}

    class LazyLLMDataset(torch.utils.data.Dataset[Any]):
        def __init__(
            self, dataset: Any, encode_func: Any, *, strict: bool = False, random_state: Any = None
        ) -> None:
            self.dataset, self.encode = dataset, encode_func

        def __len__(self) -> int:
            return len(self.dataset)

        def __getitem__(self, index: int) -> Any:
            return self.encode(self.dataset[index], return_length=True)

    def load_dataset(datasets: list[Any], *, split_dataset_ratio: float = 0.0) -> Any:
        return [row for rows in datasets for row in rows], None

    stand_in(
        patch,
        {
            "swift.dataset": {"LazyLLMDataset": LazyLLMDataset, "load_dataset": load_dataset},
            "swift.trainers": {"Seq2SeqTrainer": Seq2SeqTrainer, "TrainerFactory": TrainerFactory},
        },
    )
