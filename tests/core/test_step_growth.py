"""The growth of a step's cost: what can be counted, and the fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the examples extra is absent")
pytest.importorskip("matplotlib", reason="the examples extra is absent")

from benchmarks import step_growth


def test_exponent_looks_at_the_last_three_octaves() -> None:
    values = [2.0**k for k in range(8)]
    assert step_growth.exponent(values, [5.0] * 4 + [v**2 for v in values[4:]]) == pytest.approx(2)
    assert step_growth.exponent(values, [7.0] * 8) == pytest.approx(0)


def test_memory_is_two_copies_whatever_the_number_of_weights(tmp_path: Path) -> None:
    output = tmp_path / "growth.json"
    argv = ["--axes", "elements", "tensors", "--points", "2", "--rounds", "2", "--warm_up", "1"]
    assert step_growth.main([*argv, "--threads", "1", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert output.with_suffix(".png").exists()
    for axis, points in record["results"].items():
        assert [point["value"] for point in points] == list(step_growth.AXES[axis].values[:2])
        for point in points:
            assert 1.99 < point["extra_memory"] < 2.03
            assert all(len(c["seconds"]) == 2 for c in point["contestants"].values())
