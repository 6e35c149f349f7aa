"""The comparison of implementations: its formula, its cases, its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.reference import booster_gradient

comparison = pytest.importorskip("benchmarks.comparison", reason="the benchmarks extra is absent")

EXACT = 1e-12


def test_the_formula_is_the_oracle() -> None:
    """Two computations that share no line."""
    torch.manual_seed(3)
    model = comparison.Classifier(0.0, aside=True).double()
    f, h = comparison.losses(3, 0, comparison.Case(micro_batches=2))
    names = [n for n, _ in model.named_parameters()]

    class At(nn.Module):
        def __init__(self, values: Any) -> None:
            super().__init__()
            self.values = dict(zip(names, values, strict=True))

        def parameters(self, recurse: bool = True) -> Any:
            return iter(self.values.values())

        def forward(self, x: Any, harmful: bool) -> Any:
            return functional_call(model, self.values, (x, harmful))

    wanted = booster_gradient(
        lambda values: torch.stack([loss(At(values)) for loss in f]).mean(),
        lambda values: h(At(values)),
        list(model.parameters()),
        comparison.LAM,
        comparison.ALPHA,
    )
    found = comparison.formula(model, f, h, comparison.LAM, comparison.ALPHA, None)
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT, msg=name)


@pytest.mark.parametrize("way", comparison.WAYS)
def test_every_way_is_the_formula_where_nothing_is_asked(way: str) -> None:
    assert comparison.measure(way, comparison.CASES["plain"], seed=1) < EXACT


@pytest.mark.parametrize("name", [n for n in comparison.CASES if "bf16" not in n])
def test_this_package_is_the_formula_in_every_case(name: str) -> None:
    case = comparison.replace(comparison.CASES[name], steps=min(3, comparison.CASES[name].steps))
    assert comparison.measure("torch_booster", case, seed=1) < EXACT


@pytest.mark.parametrize(
    ("way", "name", "value"),
    [
        ("git-disl/Booster", "accumulation over 4", 10.0),
        ("git-disl/Booster", "dropout 0.1", 0.3),
        ("git-disl/Booster", "an exception at w′", 0.99),
        ("TamperBench", "clipping at 1 asked for", 0.3),
        ("SafeTune", "after 100 steps", 0.05),
    ],
)
def test_the_others_differ_where_the_page_says(way: str, name: str, value: float) -> None:
    case = comparison.replace(comparison.CASES[name], steps=min(10, comparison.CASES[name].steps))
    found = comparison.measure(way, case, seed=1)
    assert isinstance(found, float)
    assert found > value


def test_what_fails_and_what_is_not_offered_says_so() -> None:
    cases = comparison.CASES
    aside = comparison.measure("git-disl/Booster", cases["a layer that h does not reach"], seed=1)
    assert "does not reach" in aside
    assert comparison.measure("SafeTune", cases["accumulation over 4"], seed=1) is None


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "new" / "comparison.json"
    assert comparison.main(["--seeds", "1", "--steps", "2", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert len(comparison.by_case(rows)) == len(comparison.CASES)
    assert len(comparison.by_setting(rows)) == len(comparison.SETTINGS)


def test_ctrl_c_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "measure", interrupted)
    output = tmp_path / "comparison.json"
    assert comparison.main(["--output", str(output)]) == 130
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["--seeds", "0"], 2), (["--steps", "1"], 2)]
)
def test_the_command_ends_before_it_begins(arguments: list[str], status: int) -> None:
    with pytest.raises(SystemExit) as end:
        comparison.main(arguments)
    assert end.value.code == status
