"""Booster in torchtitan's training step, each step against the formula.

Only its trainer's constructor is not run, which takes a GPU: the test puts in place what that
makes, and then takes torchtitan's own steps.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests import toolkits
from tests.reference import booster_gradient

LAM, ALPHA, CLIP, STEPS = 3.0, 0.1, 0.1, 4
ON = "real" if toolkits.is_installed("torchtitan") else "stand-in"


@pytest.fixture(params=[ON])
def titan(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, on the real package where there is one."""
    if ON == "stand-in":
        toolkits.torchtitan(monkeypatch)
        monkeypatch.delitem(sys.modules, "torch_booster.integrations.torchtitan", raising=False)
    yield importlib.import_module("torch_booster.integrations.torchtitan")
    if ON == "stand-in":
        sys.modules.pop("torch_booster.integrations.torchtitan", None)


class Model(nn.Module):
    """As torchtitan calls its models: tokens in, scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = toolkits.TokenModel()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            self.passes += 1
        return self.tokens(x).logits


def batches(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(12, (2, 7), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        labels[0, : int(torch.randint(1, 4, (), generator=generator))] = -100
        yield {"input": ids}, labels


def loss_fn(scores: Tensor, labels: Tensor, tokens: Tensor, **_: Any) -> tuple[Tensor, None]:
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / tokens, None


def trainer_on(titan: Any, model: nn.Module, **changes: Any) -> Any:
    """What the trainer's constructor would make on one device."""
    from torchtitan.components.optimizer import OptimizersContainer

    trainer = object.__new__(titan.BoosterTrainer)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    container: Any = object.__new__(OptimizersContainer)
    container.optimizers = [base]
    container.model_parts = [model]
    training = SimpleNamespace(disable_cuda_graphs=True, max_norm=CLIP)
    config = {
        "lam": LAM,
        "alpha": ALPHA,
        "norm": "global",
        "lam_warmup_steps": 0,
        "lam_delay_steps": 0,
        "trust_region": False,
        "every": 1,
    }
    kinds = "pp_enabled", "dp_enabled", "dp_cp_enabled", "cp_enabled", "ep_enabled"
    dims = dict.fromkeys(kinds, False)
    put = {
        "config": SimpleNamespace(
            training=training,
            parallelism=SimpleNamespace(spmd_backend="default"),
            **{**config, **changes},
        ),
        "parallel_dims": SimpleNamespace(**dims, get_optional_mesh=lambda _: None),
        "model_parts": [model],
        "model_config": None,
        "optimizers": container,
        "lr_schedulers": SimpleNamespace(step=lambda: None, get_metrics=dict),
        "metrics_processor": SimpleNamespace(should_log=lambda _: False),
        "checkpointer": SimpleNamespace(maybe_wait_for_staging=lambda: None),
        "train_context": contextlib.nullcontext,
        "gradient_accumulation_steps": 2,
        "num_pipeline_parallel_microbatches": 1,
        "ntokens_seen": 0,
        "step": 0,
        "device": torch.device("cpu"),
        "loss_fn": loss_fn,
        "harmful": titan._stream([]),
    }
    vars(trainer).update(put)
    if ON == "real":
        trainer.fwd_bwd_fn = trainer._forward_backward_body
    return trainer


def test_each_step_is_the_formula(titan: Any) -> None:
    torch.manual_seed(0)
    model = Model().double()
    trainer = trainer_on(titan, model)
    trainer._begin(trainer.config)
    trainer.harmful = titan.HarmfulStream(batches(2))
    names = [n for n, _ in model.named_parameters()]
    steps: list[tuple[list[Tensor], list[Tensor]]] = []

    def seen(*_: Any) -> None:
        weights = [p.detach().clone() for p in model.parameters()]
        steps.append((weights, [p.grad.clone() for p in model.parameters() if p.grad is not None]))

    trainer.booster.register_step_pre_hook(seen)
    aligned = batches(1)
    for _ in range(STEPS):
        trainer.train_step(aligned)
    assert trainer.ntokens_seen == STEPS * 2 * 14  # of the alignment passes alone
    assert model.passes == STEPS * 2
    assert trainer.booster.read_diagnostics()["harmful_loss"] > 0

    buffers = dict(model.named_buffers())

    def loss_on(parts: list[Any]) -> Any:
        tokens = torch.stack([(labels != -100).sum() for _, labels in parts]).sum()

        def loss(values: Any) -> Tensor:
            at = {n: b.clone() for n, b in buffers.items()} | dict(zip(names, values, strict=True))
            return torch.stack(
                [loss_fn(functional_call(model, at, (x["input"],)), y, tokens)[0] for x, y in parts]
            ).sum()

        return loss

    f, h = batches(1), batches(2)
    for weights, grads in steps:
        wanted = booster_gradient(
            loss_on([next(f), next(f)]), loss_on([next(h)]), weights, LAM, ALPHA
        )
        whole = [torch.zeros(()) if g is None else g for g in wanted]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in whole]))
        assert norm > CLIP
        for found, g in zip(grads, whole, strict=True):
            torch.testing.assert_close(found, g * (CLIP / norm), rtol=1e-4, atol=1e-9)


def test_the_configurations_values_are_the_optimizers(titan: Any) -> None:
    values = {"lam": 2.0, "alpha": 0.3, "norm": "tensor", "every": 2, "trust_region": True}
    values |= {"lam_warmup_steps": 5, "lam_delay_steps": 3}
    trainer = trainer_on(titan, Model(), **values)
    trainer._begin(trainer.config)
    assert {name: getattr(trainer.booster, name) for name in values} == values


def test_each_regulariser_has_its_batch_in_a_resumed_run_too(titan: Any) -> None:
    harmful = list(islice(batches(2), 3))

    def given(first: int, steps: int) -> list[int]:
        """Which batches the regularisers are given."""
        trainer = trainer_on(titan, Model(), every=2)
        trainer._begin(trainer.config)
        trainer.harmful = titan._stream(harmful)
        for group in trainer.booster.param_groups:
            group["booster_step"] = first
        found: list[int] = []

        def loss(scores: Tensor, labels: Tensor, tokens: Tensor, **rest: Any) -> Any:
            found.extend(n for n, (_, x) in enumerate(harmful) if torch.equal(x, labels))
            return loss_fn(scores, labels, tokens, **rest)

        trainer.loss_fn = loss
        for _ in range(steps):
            trainer.train_step(batches(1))
        return found

    # Two passes each, and a third of the first, which looks whether they repeat.
    assert given(0, 9) == [0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert given(4, 5) == [2, 2, 2, 0, 0, 1, 1]


def test_lam_zero_reads_no_harmful_batch(titan: Any) -> None:
    trainer = trainer_on(titan, Model(), lam=0.0)
    trainer._begin(trainer.config)
    trainer.train_step(batches(1))
    assert trainer.booster.step_count == 1


def test_an_empty_harmful_loader_is_told(titan: Any) -> None:
    trainer = trainer_on(titan, Model())
    trainer._begin(trainer.config)
    with pytest.raises(ValueError, match="has no batch"):
        trainer.train_step(batches(1))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: setattr(t.parallel_dims, "pp_enabled", True), "pipeline parallelism"),
        (lambda t: setattr(t.config.training, "disable_cuda_graphs", False), "CUDA graph"),
        (lambda t: t.optimizers.optimizers.append(t.optimizers.optimizers[0]), "2 optimizers"),
    ],
)
def test_what_cannot_work_is_refused(titan: Any, change: Any, error: str) -> None:
    trainer = trainer_on(titan, Model())
    change(trainer)
    with pytest.raises(ValueError, match=error):
        trainer._begin(trainer.config)


def test_the_configuration_is_torchtitans_with_boosters(titan: Any) -> None:
    kind = titan.BoosterTrainer.Config
    assert issubclass(kind, titan.Trainer.Config)
    assert (kind().lam, kind(alpha=0.2).alpha) == (5.0, 0.2)


def test_a_missing_harmful_loader_is_told_before_anything_is_built(titan: Any) -> None:
    with pytest.raises(ValueError, match="harmful_dataloader is missing"):
        titan.BoosterTrainer(titan.BoosterTrainer.Config())


def test_a_harmful_stream_does_not_go_back(titan: Any) -> None:
    """Where `every` grows in the course of a run: one batch would serve hundreds of steps."""
    stream = titan.HarmfulStream(iter("abcd"))
    assert [stream.batch(n) for n in (0, 2, 2)] == ["a", "c", "c"]
    with pytest.raises(ValueError, match="harmful batch 1 is asked for after batch 2"):
        stream.batch(1)
