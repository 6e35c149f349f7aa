"""Long runs: nothing grows, nothing drifts, and a run that is broken off goes on bit for bit."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Counts
from tests.trainees import raw, same
from torch_booster import BoosterOptimizer

drift = pytest.importorskip("benchmarks.drift", reason="the benchmarks extra is absent")


class Batches:
    """Batches of a shuffled set without end, and the position in it."""

    def __init__(self, target: float, seed: int) -> None:
        self.dice = torch.Generator().manual_seed(seed)
        data = torch.Generator().manual_seed(round(10 * target))
        self.x = torch.randn(20, 6, generator=data)
        self.y = target + torch.randn(20, 2, generator=data)
        self.order, self.position = torch.randperm(20, generator=self.dice), 0

    def draw(self) -> tuple[Tensor, Tensor]:
        if self.position == 20:
            self.order, self.position = torch.randperm(20, generator=self.dice), 0
        chosen = self.order[self.position : self.position + 4]
        self.position += 4
        return self.x[chosen], self.y[chosen]

    def state(self) -> dict[str, Any]:
        dice = self.dice.get_state()
        return {"dice": dice, "order": self.order, "position": self.position}

    def load(self, state: dict[str, Any]) -> None:
        self.dice.set_state(state["dice"])
        self.order, self.position = state["order"], state["position"]


class Training:
    """Dropout, a scheduler, a GradScaler that skips steps, and two shuffled sets."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.opt = BoosterOptimizer(base, 1.0 + seed, 0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, T_max=100)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=30)
        self.alignment, self.harmful = Batches(0.5, seed), Batches(-0.5, seed + 1)
        self.steps = 0

    def closure(self, batch: tuple[Tensor, Tensor], factor: float = 1.0) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.scaler.scale(factor * loss).backward()
            return loss

        return closure

    def step(self) -> None:
        """One step; every 50th overflows, so that the scaler skips it and scales by half."""
        self.steps += 1
        self.opt.zero_grad()
        self.opt.regularize(self.closure(self.harmful.draw()))
        self.closure(self.alignment.draw(), float("inf") if self.steps % 50 == 0 else 1.0)()
        self.scaler.step(self.opt)
        self.scaler.update()
        if self.steps % 50:
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "alignment": self.alignment.state(),
            "harmful": self.harmful.state(),
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.alignment.load(state["alignment"])
        self.harmful.load(state["harmful"])
        torch.set_rng_state(state["rng"])

    def checkpoint(self) -> bytes:
        file = io.BytesIO()
        torch.save(self.state(), file)
        return file.getvalue()

    def weights(self) -> str:
        """A digest of every bit of the weights."""
        bits = torch.cat([raw(p) for p in self.model.parameters()])
        return hashlib.sha256(bytes(bits.tolist())).hexdigest()


# Growth


class Held(NamedTuple):
    """What Python holds: tensors, their bytes, and its own small blocks of memory."""

    tensors: int
    nbytes: int
    blocks: int


def held() -> Held:
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]  # no fake ones
    result = Held(len(tensors), sum(t.nbytes for t in tensors), 0)
    del tensors
    return result._replace(blocks=sys.getallocatedblocks())


def test_nothing_grows(full: bool, counts: Counts) -> None:
    steps = 10_000 if full else 1_000
    training = Training(0)
    for _ in range(100):
        training.step()
    before = held()
    for _ in range(steps):
        training.step()
    after = held()
    assert after[:2] == before[:2]
    noise = steps / (4 if full else 2)  # of the rest of a large test process
    assert after.blocks - before.blocks < noise, "less than one small object for each step"
    counts.add("steps without growth", steps, 0)


# Broken off and resumed


def resumed(checkpoint: bytes, without: str = "") -> Training:
    """A new process's training after it has loaded a checkpoint, or all of it but one part."""
    training = Training(3)
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    training.load(training.state() | {k: v for k, v in state.items() if k != without})
    return training


def test_broken_runs_go_on_bit_for_bit(full: bool, counts: Counts) -> None:
    """Each break is some steps after the last checkpoint, so that these are taken once more."""
    steps, breaks = (10_000, 20) if full else (300, 3)
    unbroken = Training(0)
    trajectory = [unbroken.weights()]
    for _ in range(steps):
        unbroken.step()
        trajectory.append(unbroken.weights())
    end = copy.deepcopy(unbroken.state())
    assert end["opt"]["state"][0]["step"] < steps, "the scaler was to skip some steps"

    rng = random.Random(0)
    training, losses = Training(0), 0
    for saved in [*sorted(rng.sample(range(steps), breaks)), steps]:
        differ = 0
        while training.steps < saved:
            training.step()
            differ += training.weights() != trajectory[training.steps]
        losses += bool(differ)
        if saved < steps:
            checkpoint = training.checkpoint()
            for _ in range(rng.randrange(5)):
                training.step()
            training = resumed(checkpoint)
    counts.add("runs broken off and resumed", breaks, losses)
    assert not losses
    assert same(training.state(), end)


PARTS = ["steps", "model", "opt", "scheduler", "scaler", "alignment", "harmful", "rng"]


@pytest.mark.parametrize("part", ["", *PARTS])
def test_every_part_of_a_checkpoint_is_needed(part: str) -> None:
    """So that the test above would notice if one of them were not restored."""
    training = Training(0)
    assert list(training.state()) == PARTS
    for _ in range(12):
        training.step()
    checkpoint = training.checkpoint()
    for _ in range(8):
        training.step()
    end = copy.deepcopy(training.state())
    again = resumed(checkpoint, without=part)
    for _ in range(8):
        again.step()
    assert same(again.state(), end) == (part == "")


# Drift


@pytest.mark.parametrize("dtype", drift.DTYPES, ids=str)
def test_weights_that_are_restored_do_not_drift(
    dtype: torch.dtype, full: bool, counts: Counts
) -> None:
    """Those that are added back do, which shows that the measure would see it."""
    steps = 10_000 if full else 1_000
    rows = drift.drift(dtype, "restored", steps, seed=0)
    lost = sum(bool(row["drift"] or row["moved"]) for row in rows)
    counts.add("perturbations restored", steps, lost)
    assert not lost
    assert rows[-1]["round"] == steps
    added_back = drift.drift(dtype, "added back", 200, seed=0)
    assert added_back[-1]["drift"] > 0
    assert added_back[-1]["moved"] > 0.05


def test_drift_writes_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "new" / "drift.json"
    assert drift.main(["--steps", "20", "--seed", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["way"] for row in rows} == set(drift.WAYS)
    assert all(row["drift"] == 0 for row in rows if row["way"] == "restored")
    assert output.with_suffix(".png").stat().st_size > 0


def test_drift_stops_at_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drift, "drift", interrupted)
    assert drift.main(["--output", str(tmp_path / "drift.json")]) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--steps", "0"], 2)])
def test_drift_ends_before_it_begins(arguments: list[str], status: int) -> None:
    with pytest.raises(SystemExit) as stop:
        drift.main(arguments)
    assert stop.value.code == status
