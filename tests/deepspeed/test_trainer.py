"""The Trainer and Accelerate under DeepSpeed on two processes equal the formula on one process."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from tests.deepspeed.runs import (
    LR,
    WORLD,
    Run,
    Values,
    batch,
    config,
    difference,
    noise,
    oracle,
    param_groups,
    part,
    values,
)
from tests.multi_process import run_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: make test-deepspeed",
)

STAGES = (0, 1, 2, 3)
PER_RANK = 8 // WORLD


class Task(nn.Module):
    """A net that returns its loss, as the Trainer's models do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor, harmful: Tensor) -> dict[str, Tensor]:
        out = self.net(x, bool(harmful[0]))
        return {"loss": nn.functional.mse_loss(out.float(), y.float())}


def rows(run: Run, harmful: bool) -> list[dict[str, Tensor]]:
    """The batches of `runs.batch` one after the other; a rank's part is one batch of the loader."""
    micros = 1 if harmful else run.accumulation
    pairs = [batch(step, k, harmful) for step in range(run.steps) for k in range(micros)]
    flag = torch.tensor(harmful)
    return [
        {"x": x.float(), "y": y.float(), "harmful": flag}
        for xs, ys in pairs
        for x, y in zip(xs, ys, strict=True)
    ]


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([x[key] for x in examples]) for key in examples[0]}


def on_a_cpu() -> None:
    """Accelerate takes DeepSpeed beside a GPU only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]


def surroundings(rank: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD}.items():
        os.environ[name] = str(value)
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # an Accelerator leaves it behind
    on_a_cpu()


def kinds() -> tuple[type[Any], type[Any]]:
    """A trainer whose batches and whose optimizer are those of the oracle, and the same by us."""
    from transformers import Trainer

    from torch_booster.integrations.transformers import BoosterMixin

    class Plain(Trainer):
        run: Run

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def create_optimizer(self, *_: Any) -> Any:
            groups = param_groups(self.run, self.model.net)  # type: ignore[union-attr, arg-type]
            self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
            return self.optimizer

    class Ours(BoosterMixin, Plain):
        def get_harmful_dataloader(self) -> Any:
            return DataLoader(self._harmful_dataset, PER_RANK, collate_fn=collate)

    return Plain, Ours


def trainer(run: Run, rank: int, folder: str, booster: bool = True, **changes: Any) -> Any:
    surroundings(rank)
    from transformers import TrainingArguments

    from torch_booster.integrations.transformers import BoosterArguments

    given = config(run) | {"train_batch_size": "auto", "gradient_clipping": "auto"}
    args = TrainingArguments(
        folder,
        deepspeed=given,
        per_device_train_batch_size=PER_RANK,
        gradient_accumulation_steps=run.accumulation,
        max_grad_norm=run.clip,
        learning_rate=LR,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **{
            "max_steps": run.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "log_level": "error",
            **changes,
        },
    )
    plain, ours = kinds()
    kind = ours if booster else plain
    kind.run = run
    told = BoosterArguments(run.lam, run.alpha, lam_warmup_steps=run.warmup, norm=run.norm)  # type: ignore[arg-type]
    more = {"harmful_dataset": rows(run, True), "booster_args": told} if booster else {}
    return kind(
        model=Task(run.net()), args=args, train_dataset=rows(run, False), data_collator=collate, **more
    )


def weights(made: Any) -> Values:
    """Those of the net, after which the engine is given up."""
    found = values(made.accelerator.deepspeed_engine_wrapped.engine)
    made.accelerator.free_memory()
    return {name.removeprefix("net."): x for name, x in found.items()}


def trained(run: Run, rank: int, folder: str, booster: bool = True, **changes: Any) -> Any:
    made = trainer(run, rank, folder, booster, **changes)
    made.train()
    return made


def is_the_formula(name: str, run: Run, rank: int, found: Values) -> None:
    if rank == 0:
        expected = oracle(run)
        off, own = difference(found, expected), noise(run)
        effect = difference(oracle(run, booster=False), expected)
        print(f"trainer {name}: off {off:.2e}, noise {own:.2e}, effect {effect:.1e}")
        assert off <= 2 * own, f"{off} off, where float32 alone is {own}"
        assert effect > 1e4 * off


def the_trainer_follows_the_formula(name: str, run: Run, folder: str, rank: int) -> None:
    is_the_formula(name, run, rank, weights(trained(run, rank, folder)))


def exact() -> dict[str, Run]:
    made: dict[str, Run] = {}
    for stage in STAGES:
        run = Run(stage=stage)
        made[f"{stage}"] = run
        made[f"{stage}-accumulated-clipped"] = replace(run, accumulation=2, clip=1.0)
        many = replace(run, accumulation=2, groups=True, norm="tensor", warmup=4)
        made[f"{stage}-groups-tensor-warmup"] = many
    return made


def cases(folder: str) -> dict[str, Callable[[int], None]]:
    made: dict[str, Callable[[int], None]] = {}
    for name, run in exact().items():
        made[f"trainer-{name}"] = partial(the_trainer_follows_the_formula, name, run, folder)
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """All of them in one set of processes, whose start takes longer than they do."""
    return run_cases(cases(str(tmp_path_factory.mktemp("runs"))), WORLD)


@pytest.mark.parametrize("name", list(cases(tempfile.gettempdir())))
def test_two_processes(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
