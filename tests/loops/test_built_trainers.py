"""Toolkits that build a `transformers.Trainer` by themselves: Axolotl, ms-swift, Unsloth."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests import toolkits
from tests.loops.test_transformers import arguments, collate, sentences, tiny_llama
from torch_booster import BoosterOptimizer
from torch_booster.integrations.transformers import BoosterArguments, BoosterMixin, BoosterTrainer

LAM = 3.0


def weights_of(trainer: Any) -> list[torch.Tensor]:
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()]


def expected(folder: Path) -> list[torch.Tensor]:
    """The same run by the trainer that is tested against the formula."""
    return weights_of(
        BoosterTrainer(
            tiny_llama(),
            arguments(folder, seed=1),
            train_dataset=sentences(8, 1),
            data_collator=collate,
            harmful_dataset=sentences(8, 2),
            booster_args=BoosterArguments(lam=LAM),
        )
    )


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Any]:
    """The integration on a stand-in, and nothing of it afterwards."""
    path = f"torch_booster.integrations.{name}"
    getattr(toolkits, name)(monkeypatch)
    monkeypatch.delitem(sys.modules, path, raising=False)
    yield importlib.import_module(path)
    sys.modules.pop(path, None)


# ------------------------------------------------------------------------------------ Axolotl


@pytest.fixture(params=["stand-in"])
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from fresh(monkeypatch, "axolotl")


def configuration(**keys: Any) -> Any:
    from axolotl.utils.dict import DictDefault

    given = {
        "booster_lam": LAM,
        "booster_harmful_datasets": [{"path": sentences(8, 2)}],
        "datasets": [{"path": sentences(8, 1)}],
    }
    return DictDefault({**given, **keys})


def test_axolotl_trains_on_the_booster_gradient(axolotl: Any, tmp_path: Path) -> None:
    plugin, cfg = axolotl.BoosterPlugin(), configuration()
    trainer = plugin.get_trainer_cls(cfg)(
        model=tiny_llama(),
        args=arguments(tmp_path, seed=1),
        train_dataset=sentences(8, 1),
        data_collator=collate,
        dataset_tags=["any"],
    )
    plugin.post_trainer_create(cfg, trainer)
    assert same(weights_of(trainer), expected(tmp_path))
    assert cfg.datasets == [{"path": sentences(8, 1)}]  # which was lent and not changed


def test_axolotls_keys_are_the_arguments(axolotl: Any) -> None:
    keys = {"booster_alpha": 0.2, "booster_norm": "tensor", "booster_harmful_batch_size": 4}
    keys |= {"booster_trust_region": True}
    given = axolotl.arguments(configuration(**keys))
    assert given == BoosterArguments(
        lam=LAM, alpha=0.2, norm="tensor", per_device_harmful_batch_size=4, trust_region=True
    )
    assert axolotl.BoosterPlugin().get_input_args().endswith("BoosterConfig")
    fields = axolotl.BoosterConfig.model_fields
    assert axolotl.arguments({n: f.default for n, f in fields.items()}) == BoosterArguments()


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"rl": "dpo"}, "does not serve preference"),
        ({"sample_packing": True}, "does not serve sample packing"),
        ({"deepspeed": "zero2.json"}, "does not serve DeepSpeed"),
        ({"booster_harmful_datasets": None}, "booster_harmful_datasets is missing"),
        ({"booster_alpha": -0.1}, "alpha must be finite"),
    ],
)
def test_axolotls_keys_are_checked_before_a_trainer_is(
    axolotl: Any, keys: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        axolotl.BoosterPlugin().get_trainer_cls(configuration(**keys))


# ------------------------------------------------------------------------------------ ms-swift


@pytest.fixture(params=["stand-in"])
def swift(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from fresh(monkeypatch, "ms_swift")


def template(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "data_collator": collate,
        "encode": lambda row, return_length: row,
        "packing": False,
        "padding_free": False,
    }
    return SimpleNamespace(**{**given, **changes})


def test_ms_swift_trains_on_the_booster_gradient(swift: Any, tmp_path: Path) -> None:
    from swift.trainers import TrainerFactory

    swift.serve([sentences(8, 2)], BoosterArguments(lam=LAM))
    module, _, name = TrainerFactory.TRAINER_MAPPING["causal_lm"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    args = arguments(tmp_path, seed=1)
    trainer = kind(
        model=tiny_llama(), args=args, template=template(), train_dataset=sentences(8, 1)
    )
    found = weights_of(trainer)
    assert same(found, expected(tmp_path))
    assert isinstance(trainer.optimizer.optimizer, BoosterOptimizer)
    assert len(trainer.custom_metrics["train"]["passes"]) == 3  # of the alignment passes
    trainer.optimizer = None
    trainer.create_optimizer_and_scheduler(3)  # which earlier versions of transformers call
    assert isinstance(trainer.optimizer, BoosterOptimizer)


def test_ms_swift_is_told_that_there_is_no_harmful_dataset(swift: Any) -> None:
    with pytest.raises(ValueError, match="harmful is empty"):
        swift.serve([])


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_ms_swift_is_told_what_is_not_served(swift: Any, option: str) -> None:
    """Before the trainer is built: it gets nothing that it could be built of."""
    swift.serve([sentences(8, 2)])
    with pytest.raises(ValueError, match="does not serve packing"):
        swift.BoosterSeq2SeqTrainer(
            model=None, args=None, template=template(**{option: True}), train_dataset=[]
        )


def test_ms_swift_under_deepspeed_is_refused(
    swift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift.serve([sentences(8, 2)])
    accelerated = Trainer.create_accelerator_and_postprocess

    def under_deepspeed(trainer: Any) -> None:
        accelerated(trainer)
        trainer.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    with pytest.raises(RuntimeError, match="does not serve DeepSpeed"):
        swift.BoosterSeq2SeqTrainer(
            model=tiny_llama(),
            args=arguments(tmp_path),
            template=template(),
            train_dataset=sentences(8, 1),
        )


# ------------------------------------------------------------------------------------ Unsloth


def unsloth_with_a_model() -> type[Trainer]:
    class UnslothTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            return super().create_optimizer() if model is None else super().create_optimizer(model)

    return UnslothTrainer


def unsloth_without() -> type[Trainer]:
    class UnslothTrainer(Trainer):
        def create_optimizer(self) -> Any:
            return super().create_optimizer()

    return UnslothTrainer


@pytest.mark.parametrize("kind", [unsloth_with_a_model, unsloth_without])
def test_unsloths_trainer_steps_on_the_booster_gradient(kind: Any, tmp_path: Path) -> None:
    """A stand-in: Unsloth itself asks for a GPU when it is imported."""

    class BoosterUnslothTrainer(BoosterMixin, kind()):
        pass

    trainer = BoosterUnslothTrainer(
        tiny_llama(),
        arguments(tmp_path, seed=1),
        train_dataset=sentences(8, 1),
        data_collator=collate,
        harmful_dataset=sentences(8, 2),
        booster_args=BoosterArguments(lam=LAM),
    )
    assert same(weights_of(trainer), expected(tmp_path))
