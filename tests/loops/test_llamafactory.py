"""Booster in LLaMA-Factory's v1 trainer, each step against the formula."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests import toolkits
from tests.reference import booster_gradient

LAM, ALPHA, CLIP, STEPS = 3.0, 0.1, 0.1, 4
ON = "real" if toolkits.is_installed("llamafactory") else "stand-in"
# Its loader pins memory, and says that there is no accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


class Named(dict[str, Any]):
    """A plugin's configuration: a mapping with its name as an attribute."""

    @property
    def name(self) -> str:
        return self["name"]


@pytest.fixture(params=[ON])
def factory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, on the real package where there is one."""
    if ON == "stand-in":
        toolkits.llamafactory(monkeypatch)
        monkeypatch.delitem(sys.modules, "torch_booster.integrations.llamafactory", raising=False)
    yield importlib.import_module("torch_booster.integrations.llamafactory")
    if ON == "stand-in":
        sys.modules.pop("torch_booster.integrations.llamafactory", None)


def rows(seed: int) -> list[dict[str, Any]]:
    """Sentences of one length, of which unequal numbers of tokens carry a loss."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(16):
        ids = torch.randint(12, (7,), generator=generator).tolist()
        prompt = 1 + k % 4
        found.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * 7,
                "labels": [-100] * prompt + ids[prompt:],
                "loss_weights": [0.0] * prompt + [1.0] * (7 - prompt),
            }
        )
    # The loss of a masked token is weighed with zero, but a label must be a token.
    return [{**row, "labels": [max(x, -100) for x in row["labels"]]} for row in found]


RENDERER = SimpleNamespace(
    processor=SimpleNamespace(model_input_names=["input_ids", "attention_mask"]),
    process_samples=lambda samples: [dict(sample) for sample in samples],
)


def arguments(**changes: Any) -> Any:
    from llamafactory.v1.config import BatchingStrategy

    given: dict[str, Any] = {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "cutoff_len": 16,
        "batching_workers": 0,
        "batching_strategy": BatchingStrategy.NORMAL,
        "seed": 0,
        "max_steps": STEPS,
        "num_train_epochs": 1,
        "save_epochs": None,
        "save_steps": None,
        "logging_steps": 100,
        "enable_activation_checkpointing": False,
        "dist_config": None,
        "resume_from_checkpoint": None,
        "save_ckpt_as_hf": False,
        "lr_scheduler_config": None,
        "max_grad_norm": CLIP,
        "bf16": False,
        "learning_rate": 1.0,
        "output_dir": "unused",
        "optim_config": Named(name="booster", lr="1e-2", lam=LAM, alpha="0.1"),
    }
    return SimpleNamespace(**{**given, **changes})


def trainer_on(model: Any, **changes: Any) -> Any:
    """A trainer that keeps the batch of each pass."""
    from llamafactory.v1.trainers.sft_trainer import SFTTrainer

    class Recorded(SFTTrainer):
        def compute_loss(self, batch: Any) -> Tensor:
            self.passes.append(batch)
            return super().compute_loss(batch)

    given = arguments(**changes)
    trainer = Recorded(args=given, model=model, renderer=RENDERER, train_dataset=rows(1))
    trainer.passes = []
    return trainer


def test_each_step_is_the_formula(factory: Any) -> None:
    torch.manual_seed(0)
    model = toolkits.TokenModel().double()
    trainer = trainer_on(model)
    trainer.callback_handler.add_callback(factory.BoosterCallback(trainer, rows(2)))
    names = [n for n, _ in model.named_parameters()]
    steps: list[tuple[list[Any], list[Tensor], list[Tensor]]] = []

    def seen(*_: Any) -> None:
        weights = [p.detach().clone() for p in model.parameters()]
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        steps.append((list(trainer.passes), weights, grads))
        trainer.passes.clear()

    trainer.optimizer.register_step_pre_hook(seen)
    trainer.fit()
    assert len(steps) == STEPS

    def loss_at(values: Any, batch: Any) -> Tensor:
        at = dict(zip(names, values, strict=True))
        scores = functional_call(model, at, (batch["input_ids"],))
        losses = torch.nn.functional.cross_entropy(
            scores.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )
        return losses.sum()  # of the tokens that carry one

    def tokens(batches: list[Any]) -> int:
        return sum(int((batch["labels"] != -100).sum()) for batch in batches)

    for number, (passes, weights, grads) in enumerate(steps):
        harmful, aligned = passes[:-2], passes[-2:]
        assert len(harmful) == (3 if number == 0 else 2)  # the first looks whether they repeat
        assert all(x is harmful[0] for x in harmful)
        wanted = booster_gradient(
            lambda values, a=aligned: sum(loss_at(values, x) for x in a) / tokens(a),  # type: ignore
            lambda values, h=harmful[0]: loss_at(values, h) / tokens([h]),
            weights,
            LAM,
            ALPHA,
        )
        whole = [torch.zeros(()) if g is None else g for g in wanted]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in whole]))
        assert norm > CLIP
        for found, g in zip(grads, whole, strict=True):
            torch.testing.assert_close(found, g * (CLIP / norm), rtol=1e-5, atol=1e-7)


def test_harmful_passes_leave_the_buffers_as_they_are(factory: Any) -> None:
    class Counting(toolkits.TokenModel):
        """Counts the tokens that it has seen."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, input_ids: Tensor, **given: Any) -> Any:
            self.seen += input_ids.numel()
            return super().forward(input_ids, **given)

    trainer = trainer_on(Counting())
    trainer.callback_handler.add_callback(factory.BoosterCallback(trainer, rows(2)))
    trainer.fit()
    batches = STEPS * trainer.args.global_batch_size
    assert trainer.model.seen == 7 * batches < sum(x["input_ids"].numel() for x in trainer.passes)


def harmful_batches(trainer: Any) -> list[Tensor]:
    """What the regularisers to come are given."""
    found: list[Tensor] = []
    taken = trainer.optimizer.regularize

    def regularize(closure: Any) -> Any:
        trainer.passes.clear()
        value = taken(closure)
        found.append(trainer.passes[0]["input_ids"])
        return value

    trainer.optimizer.regularize = regularize
    return found


def test_a_resumed_run_goes_on_in_the_harmful_stream(factory: Any) -> None:
    def batches(first: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = toolkits.TokenModel()
        trainer = trainer_on(model, max_steps=12 - first)
        for group in trainer.optimizer.param_groups:
            group["booster_step"] = first
        trainer.callback_handler.add_callback(factory.BoosterCallback(trainer, rows(2)))
        found = harmful_batches(trainer)
        trainer.fit()
        return found

    unbroken, resumed = batches(0), batches(9)  # in its second epoch of 8 batches
    assert len(resumed) == 3
    assert all(torch.equal(a, b) for a, b in zip(unbroken[9:], resumed, strict=True))


def test_a_step_that_is_skipped_has_its_harmful_batch_again(factory: Any) -> None:
    """The trainer does not step where the norm of the gradients is not finite."""
    model = toolkits.TokenModel()
    trainer = trainer_on(model)
    trainer.callback_handler.add_callback(factory.BoosterCallback(trainer, rows(2)))
    found = harmful_batches(trainer)
    spoils = iter([1.0, torch.nan])
    model.head.bias.register_hook(lambda g: g * (next(spoils, 1.0) if len(found) == 2 else 1.0))
    trainer.fit()
    assert trainer.optimizer.step_count == STEPS - 1
    same = [torch.equal(a, b) for a, b in pairwise(found)]
    assert same == [False, True, False]


def test_lam_zero_reads_no_harmful_row(factory: Any) -> None:
    model = toolkits.TokenModel()
    trainer = trainer_on(model, optim_config=Named(name="booster", lr=0.1, lam=0.0))
    trainer.callback_handler.add_callback(factory.BoosterCallback(trainer, [object()] * 4))
    trainer.fit()
    assert len(trainer.passes) == 2 * STEPS


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, "no lr"),
        ({"lr": 0.1, "betas": [0.9, 0.95]}, "unknown keys: betas"),
        ({"lr": 0.1, "lam": -1.0}, "lam must be finite and not negative"),
        ({"lr": 0.1, "norm": "layer"}, "norm is 'layer'"),
        ({"lr": 0.1, "every": 0}, "every is 0"),
    ],
)
def test_a_bad_configuration_is_told(factory: Any, config: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        factory.booster(toolkits.TokenModel(), config)


def test_the_configurations_values_are_the_optimizers(factory: Any) -> None:
    values = {"lam": 2.0, "alpha": 0.3, "norm": "tensor", "every": 2, "trust_region": True}
    values |= {"lam_warmup_steps": 5, "lam_delay_steps": 3}
    made = factory.booster(toolkits.TokenModel(), {"lr": 0.1, **values})
    assert {name: getattr(made, name) for name in values} == values


def test_half_a_step_is_not_rounded(factory: Any) -> None:
    with pytest.raises(TypeError, match=r"every must be a whole number, got 2\.5"):
        factory.booster(toolkits.TokenModel(), {"lr": 0.1, "every": 2.5})


@pytest.mark.parametrize(
    ("change", "kind", "error"),
    [
        ({"_deepspeed_engine": object()}, RuntimeError, "DeepSpeed"),
        ({"args": SimpleNamespace(dist_config={"cp_size": 2})}, RuntimeError, "cp_size=1"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "is a SGD"),
    ],
)
def test_what_cannot_work_is_refused(
    factory: Any, change: dict[str, Any], kind: type[Exception], error: str
) -> None:
    trainer = trainer_on(toolkits.TokenModel())
    vars(trainer).update(change)
    with pytest.raises(kind, match=error):
        factory.BoosterCallback(trainer, rows(2))


def test_too_few_harmful_rows_are_told(factory: Any) -> None:
    trainer = trainer_on(toolkits.TokenModel())
    trainer.callback_handler.add_callback(factory.BoosterCallback(trainer, rows(2)[:1]))
    with pytest.raises(ValueError, match="fewer rows than a batch"):
        trainer.fit()
