"""Lightning: manual and automatic optimization, resuming, mixed precision, two processes."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from tests.multi_process import run_cases
from tests.reference import booster_gradient
from torch_booster import BoosterOptimizer

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch.utilities import CombinedLoader  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"

# What Lightning says of itself, and of loops as small as these.
FILTERS = [
    "ignore:.*does not have many workers:UserWarning",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
    "ignore:Using ModelCheckpoint with manual optimization:UserWarning",
    "ignore:The dirpath has changed:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]

LAM, ALPHA, STEPS = 5.0, 0.1, 4
Batch = Sequence[Tensor]


class Manual(pl.LightningModule):
    """Holds every gradient that the base optimizer steps on against the oracle's."""

    usage = "staged"
    parts = 1
    clip = 0.0
    tolerance = 1e-12

    def __init__(self, lam: float = LAM) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lam = lam
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.batch: dict[str, Batch] = {}
        self.compared = 0

    def configure_optimizers(self) -> Any:
        base = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        base.register_step_pre_hook(lambda *_: self.compare())
        opt = BoosterOptimizer(base, self.lam, ALPHA)
        return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)]

    def train_dataloader(self) -> CombinedLoader:
        generator = torch.Generator().manual_seed(1)

        def loader(rows: int) -> DataLoader[Any]:
            tensors = [torch.randn(STEPS * rows, size, generator=generator) for size in (5, 3)]
            return DataLoader(TensorDataset(*(t.double() for t in tensors)), rows)

        return CombinedLoader({"alignment": loader(8), "harmful": loader(4)}, "max_size_cycle")

    def closure(self, batch: Batch, divisor: int = 1) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1]) / divisor
            self.manual_backward(loss)
            return loss

        return closure

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Any:
        self.batch = batch
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.step(opt)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        if opt.diagnostics is not None:
            self.log_dict(opt.diagnostics._asdict())

    def step(self, opt: Any) -> None:
        harmful = self.closure(self.batch["harmful"])
        if self.usage == "one_call":
            opt.step(self.closure(self.batch["alignment"]), harmful_closure=harmful)
            return
        opt.regularize(harmful)
        for part in zip(*(t.chunk(self.parts) for t in self.batch["alignment"]), strict=True):
            self.closure(part, self.parts)()
        self.clip_gradients(opt, self.clip or None, "norm")
        opt.step()

    def compare(self) -> None:
        net = copy.deepcopy(self.net)
        names = [name for name, _ in net.named_parameters()]

        def loss_on(batch: Batch) -> Callable[[Sequence[Tensor]], Tensor]:
            def loss(values: Sequence[Tensor]) -> Tensor:
                at = dict(zip(names, values, strict=True))
                return nn.functional.mse_loss(functional_call(net, at, (batch[0],)), batch[1])

            return loss

        f, h = loss_on(self.batch["alignment"]), loss_on(self.batch["harmful"])
        with torch.enable_grad():
            expected = booster_gradient(f, h, list(self.net.parameters()), self.lam, ALPHA)
        grads = [p.grad for p in self.net.parameters()]
        factor = 1.0
        if self.clip:
            norm = math.sqrt(sum(float(g.square().sum()) for g in expected if g is not None))
            assert norm > self.clip
            factor = self.clip / (norm + 1e-6)
        for grad, g in zip(grads, expected, strict=True):
            assert g is not None
            torch.testing.assert_close(grad, factor * g, rtol=0, atol=self.tolerance)
        self.compared += 1


def fit(module: Any, **options: Any) -> Any:
    options = {"precision": "64-true", "accelerator": "cpu", "max_epochs": 1} | options
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**quiet, enable_model_summary=False, **options)
    trainer.fit(module)
    return trainer


def booster(trainer: Any) -> BoosterOptimizer:
    return trainer.optimizers[0]


# --------------------------------------------------------------------------- manual optimization


@pytest.mark.parametrize(
    ("usage", "parts", "clip"),
    [("staged", 1, 0.0), ("staged", 4, 0.0), ("staged", 2, 0.1), ("one_call", 1, 0.0)],
)
def test_every_gradient_is_the_formulas(usage: str, parts: int, clip: float) -> None:
    module = Manual()
    module.usage, module.parts, module.clip = usage, parts, clip
    trainer = fit(module)
    assert module.compared == STEPS
    assert trainer.global_step == STEPS  # not three a step, nor one for each part
    opt = booster(trainer)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**STEPS)
    assert opt.diagnostics is not None
    logged = trainer.callback_metrics
    assert set(opt.diagnostics._fields) <= set(logged)
    assert logged["perturbation_norm"].item() == pytest.approx(ALPHA)


def test_lam_zero_steps_on_the_alignment_gradient() -> None:
    module = Manual(lam=0.0)
    trainer = fit(module)
    assert module.compared == trainer.global_step == STEPS
    assert booster(trainer).diagnostics is None


def test_state_set_through_lightnings_stand_in_is_the_optimizers_own() -> None:
    class Reaching(Manual):
        def step(self, opt: Any) -> None:
            own = self.optimizers(use_pl_optimizer=False)
            assert isinstance(opt, BoosterOptimizer)
            assert opt is not own
            harmful = self.closure(self.batch["harmful"])
            opt.regularize(harmful)
            assert own.diagnostics is opt.diagnostics  # type: ignore[union-attr]
            for each in (opt, own):
                with pytest.raises(RuntimeError, match="counted twice"):
                    each.regularize(harmful)  # type: ignore[union-attr]
            opt.zero_grad()
            super().step(opt)

    module = Reaching()
    fit(module)
    assert module.compared == STEPS


def test_step_without_a_regulariser_says_so() -> None:
    """Lightning hands every step a closure, so that a forgotten regularize does not pass."""

    class Forgetful(Manual):
        def step(self, opt: Any) -> None:
            self.closure(self.batch["alignment"])()
            opt.step()

    with pytest.raises(TypeError, match=r"missing harmful_closure.*regularize\(harmful_closure\)"):
        fit(Forgetful())


@pytest.mark.parametrize("how", ["optimizer", "module"])
def test_closure_that_zeroes_keeps_the_regulariser(how: str) -> None:
    class Zeroing(Manual):
        def step(self, opt: Any) -> None:
            def closure() -> Tensor:
                (opt if how == "optimizer" else self).zero_grad()
                return self.closure(self.batch["alignment"])()

            opt.regularize(self.closure(self.batch["harmful"]))
            opt.step(closure)

    module = Zeroing()
    fit(module)
    assert module.compared == STEPS


def test_closure_that_accumulates_onto_the_regulariser() -> None:
    class Accumulating(Manual):
        def step(self, opt: Any) -> None:
            opt.regularize(self.closure(self.batch["harmful"]))
            opt.step(self.closure(self.batch["alignment"]))

    module = Accumulating()
    fit(module)
    assert module.compared == STEPS


@pytest.mark.parametrize("usage", ["staged", "one_call"])
def test_bf16_mixed(usage: str) -> None:
    class Narrow(Manual):
        tolerance = 0.1  # bfloat16 keeps 8 bits, and λ multiplies a difference

        def train_dataloader(self) -> CombinedLoader:
            loaders = super().train_dataloader()
            for loader in loaders.flattened:
                loader.dataset.tensors = tuple(t.float() for t in loader.dataset.tensors)
            return loaders

    module = Narrow()
    module.usage = usage
    trainer = fit(module, precision="bf16-mixed")
    assert module.compared == STEPS
    diagnostics = booster(trainer).diagnostics
    assert diagnostics is not None
    assert diagnostics.perturbation_norm.item() == pytest.approx(ALPHA, rel=1e-3)


# --------------------------------------------------------------------------- automatic optimization


class Automatic(Manual):
    """The usual training_step; Lightning makes the alignment closure of it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        self.batch = batch
        x, y = batch["alignment"]
        return nn.functional.mse_loss(self.net(x), y)


class AutomaticBooster(Automatic):
    """The hook that hands Booster its second closure."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer.step(optimizer_closure, harmful_closure=self.harmful_closure)

    def on_train_batch_start(self, batch: dict[str, Batch], batch_idx: int) -> None:
        self.batch = batch

    def harmful_closure(self) -> Tensor:
        x, y = self.batch["harmful"]
        loss = nn.functional.mse_loss(self.net(x), y)
        loss.backward()
        return loss


def test_automatic_optimization_without_the_hook_says_so() -> None:
    module = Automatic()
    before = copy.deepcopy(module.net).double()
    with pytest.raises(TypeError, match=r"missing harmful_closure.*[Ll]ightning"):
        fit(module)
    for p, q in zip(module.net.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


def test_automatic_optimization_with_the_hook() -> None:
    module = AutomaticBooster()
    trainer = fit(module)
    assert module.compared == trainer.global_step == STEPS


def test_automatic_accumulation_takes_one_regulariser_a_step() -> None:
    class Accumulating(AutomaticBooster):
        def compare(self) -> None:
            last, self.batch = self.batch, {**self.batch, "alignment": self.both}
            super().compare()
            self.batch = last

        def on_train_batch_start(self, batch: dict[str, Batch], batch_idx: int) -> None:
            if batch_idx % 2:
                pairs = zip(self.batch["alignment"], batch["alignment"], strict=True)
                self.both = [torch.cat(pair) for pair in pairs]
            super().on_train_batch_start(batch, batch_idx)

    module = Accumulating()
    trainer = fit(module, accumulate_grad_batches=2)
    assert module.compared == trainer.global_step == STEPS // 2


def test_automatic_clipping_takes_the_alignment_part_alone() -> None:
    """Lightning clips within the closure that it makes, before the regulariser is added."""

    class Clipping(AutomaticBooster):
        def compare(self) -> None:
            combined = [p.grad.clone() for p in self.net.parameters() if p.grad is not None]
            with torch.enable_grad():
                x, y = self.batch["alignment"]
                loss = nn.functional.mse_loss(self.net(x), y)
                aligned = torch.autograd.grad(loss, list(self.net.parameters()))
            norm = torch.nn.utils.get_total_norm(aligned)
            assert norm > 0.1
            for p, g in zip(self.net.parameters(), aligned, strict=True):
                assert p.grad is not None
                p.grad += g - g * (0.1 / (norm + 1e-6))
            super().compare()
            for p, grad in zip(self.net.parameters(), combined, strict=True):
                p.grad = grad

    module = Clipping()
    fit(module, gradient_clip_val=0.1)
    assert module.compared == STEPS


# --------------------------------------------------------------------------- two processes


class Shard(Manual):
    """Each rank takes its rows of the global batch; the oracle takes all of them."""

    tolerance = 1e-10

    def step(self, opt: Any) -> None:
        whole = self.batch
        rank, size = self.global_rank, self.trainer.world_size
        self.batch = {name: [t[rank::size] for t in rows] for name, rows in whole.items()}
        self.whole = whole
        super().step(opt)

    def compare(self) -> None:
        self.batch = self.whole
        super().compare()


def ddp(usage: str, rank: int) -> None:
    for text in FILTERS:
        warnings.filterwarnings("ignore", text.split(":")[1])
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning then starts no processes of its own
    module = Shard()
    module.usage = usage
    trainer = fit(module, strategy="ddp", devices=2, use_distributed_sampler=False)
    assert trainer.world_size == 2
    assert module.compared == trainer.global_step == STEPS


def ddp_staged(rank: int) -> None:
    ddp("staged", rank)


def ddp_one_call(rank: int) -> None:
    ddp("one_call", rank)


def test_two_processes_step_on_the_gradient_of_the_global_batch() -> None:
    outcomes = run_cases({"staged": ddp_staged, "one_call": ddp_one_call}, 2)
    assert outcomes == {"staged": None, "one_call": None}


# --------------------------------------------------------------------------- the example


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__("lightning_manual")


def flags(folder: Path, *more: str) -> list[str]:
    few = ["--steps", "5", "--save_every", "2", "--batch_size", "4"]
    return [*few, "--width", "32", "--output_dir", str(folder), *more]


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["global_step"] == b["global_step"]
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    for index, state in moments[0].items():
        assert torch.equal(state["exp_avg"], moments[1][index]["exp_avg"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_example_resumes_bit_for_bit(example: ModuleType, tmp_path: Path, precision: str) -> None:
    more = ["--precision", precision]
    example.main(flags(tmp_path / "unbroken", *more))
    middle = tmp_path / "unbroken" / "checkpoints" / "epoch=0-step=2.ckpt"
    trainer = example.main(flags(tmp_path / "resumed", *more, "--resume", str(middle)))
    assert trainer.global_step == 5
    assert_same(saved(tmp_path / "unbroken"), saved(tmp_path / "resumed"))
    metrics = next((tmp_path / "resumed").rglob("metrics.csv")).read_text()
    assert "harmful_loss_drop" in metrics


def test_example_goes_on_after_ctrl_c(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the perturbed weights of step 4: what is saved is step 3's."""
    example.main(flags(tmp_path / "unbroken"))
    calls = []
    backward = example.Aligner.manual_backward

    def interrupted(self: Any, loss: Tensor) -> None:
        calls.append(loss)
        if len(calls) == 3 * 4 + 2:  # four backward passes a step, and the second of the next
            raise KeyboardInterrupt
        backward(self, loss)

    with monkeypatch.context() as context:
        context.setattr(example.Aligner, "manual_backward", interrupted)
        with pytest.raises(SystemExit):
            example.main(flags(tmp_path / "broken"))
    last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    assert saved(tmp_path / "broken")["global_step"] == 3
    example.main(flags(tmp_path / "broken", "--resume", str(last)))
    assert_same(saved(tmp_path / "unbroken"), saved(tmp_path / "broken"))


def test_example_help(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--lam", "--alpha", "--resume", "--precision", "--seed"))
