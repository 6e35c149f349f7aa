"""The study of rounding: its parts against values known otherwise, and what the library does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the examples extra is absent")
pytest.importorskip("peft", reason="the examples extra is absent")

from benchmarks import rounding

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.24 for an attribute that has been renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, -0.02, 1e-3, 3.0, -7.75, 1e-6, 0.0], dtype=dtype)
    bits = values.view(torch.int16)
    neighbours = (bits + 1).view(dtype)  # away from zero
    expected = (neighbours.double() - values.double()).abs()
    assert torch.equal(rounding.spacing(values.double(), dtype), expected)


def test_stochastic_rounding_is_right_on_average_and_exact_where_nothing_is_to_round() -> None:
    dice = torch.Generator().manual_seed(0)
    value = torch.full((100_000,), 1.003, dtype=torch.float64)
    rounded = rounding.stochastic(value, torch.bfloat16, dice).double()
    assert sorted(rounded.unique().tolist()) == [1.0, 1.0078125]
    assert rounded.mean().item() == pytest.approx(1.003, abs=1e-4)
    held = torch.tensor([1.5, -0.75, 0.0], dtype=torch.float64)
    assert torch.equal(rounding.stochastic(held, torch.bfloat16, dice).double(), held)


def test_the_measures_of_a_step_are_their_definitions() -> None:
    arrived = rounding.Arrived()
    meant = torch.tensor([3.0, 4.0, 0.0, 1.0], dtype=torch.float64)
    step = torch.tensor([3.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 4)):
        arrived.add(step[part], meant[part])
    result = arrived.result()
    assert result["moved"] == 1.0
    assert result["length"] == pytest.approx((step.norm() / meant.norm()).item())
    assert result["cosine"] == pytest.approx(torch.cosine_similarity(step, meant, dim=0).item())
    assert result["error"] == pytest.approx(((step - meant).norm() / meant.norm()).item())


def test_narrow_weights_lose_the_step_as_they_become_many() -> None:
    """As in the documentation's table, on its first two rows, and float32 loses nothing."""
    rows = [row for size in (10_000, 100_000) for row in rounding.arrival(size, "normal", 0)]
    found = {
        (row["dtype"], row["size"]): row
        for row in rounding.chosen(rows, rounding="nearest", alpha=0.01)
    }
    for dtype in ("bfloat16", "float16"):
        assert found[dtype, 100_000]["cosine"] < found[dtype, 10_000]["cosine"]
        assert found[dtype, 100_000]["moved"] < found[dtype, 10_000]["moved"]
    assert found["bfloat16", 100_000]["cosine"] == pytest.approx(0.75, abs=0.02)
    assert found["float32", 100_000]["error"] < 1e-4


def test_float32_keeps_the_regulariser_and_bfloat16_does_not() -> None:
    ways = ("float32", "bfloat16", "bfloat16, both passes in float32")
    rows = rounding.regulariser(16, 0, alphas=(0.001,), ways=ways)
    found = {row["way"]: row["cosine"] for row in rows}
    assert found["float32"] > 0.9999
    assert found["bfloat16, both passes in float32"] > 0.999
    assert found["bfloat16"] < 0.9


def test_the_command_writes_rows_and_plot(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "rounding.json"
    arguments = ["--largest", "1e4", "--widths", "8", "--seeds", "0", "--output", str(target)]
    threads = torch.get_num_threads()
    assert rounding.main([*arguments, "--threads", str(threads)]) == 0
    record = json.loads(target.read_text())
    assert {row["way"] for row in record["regulariser"]} == set(rounding.WAYS)
    assert all(math.isfinite(row["error"]) for row in record["arrival"])
    assert str(tmp_path) not in record["command"]
    assert target.with_suffix(".png").stat().st_size > 10_000


def test_ctrl_c_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounding, "arrival", interrupted)
    assert rounding.main(["--largest", "1e4", "--output", str(tmp_path / "r.json")]) == 130
    assert not list(tmp_path.iterdir())
