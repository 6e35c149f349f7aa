"""Hypothesis profile, the parts of the tests, and what the reliability tests count."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("torch_booster", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("torch_booster")

# Collected, as doctests are, it would be imported as TamperBench and taken for the real one.
collect_ignore = ["benchmarks/tamperbench_stand_in"]

TESTS = Path(__file__).parent
RECORD = TESTS.parent / "build" / "reliability.json"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Counts:
    """How often each kind of fault was tried, and how often nothing was lost."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def add(self, fault: str, tried: int, lost: int) -> None:
        self.tried[fault] += tried
        self.lost[fault] += lost

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Fault, tried, survived, lost."""
        return [(f, n, n - self.lost[f], self.lost[f]) for f, n in self.tried.items()]


# Each folder is a part of the tests, with a command of its own in the Makefile.
SHARED = {"reliability": "core"}  # whose quick half runs with the core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("reliability") is None:
            folder = item.path.parent.name if TESTS in item.path.parents else "core"
            item.add_marker(SHARED.get(folder, folder))


COUNTS = pytest.StashKey[Counts]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counts()


@pytest.fixture(params=["quick", pytest.param("full", marks=pytest.mark.reliability)])
def full(request: pytest.FixtureRequest) -> bool:
    """Whether a test runs at the size of `make test-reliability`."""
    return request.param == "full"


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Counts:
    """Where a reliability test enters what it tried and what was lost."""
    return request.config.stash[COUNTS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[COUNTS].rows()
    if not rows:
        return
    width = max(len(fault) for fault, *_ in rows)
    terminalreporter.section("reliability")
    terminalreporter.line(f"{'fault':<{width}} {'tried':>8} {'survived':>8} {'lost':>8}")
    for fault, *numbers in rows:
        terminalreporter.line(f"{fault:<{width}} " + " ".join(f"{n:>8,}" for n in numbers))
    if config.option.markexpr == "reliability":
        names = ("fault", "tried", "survived", "lost")
        record = {
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "selected": config.option.markexpr,
            "counts": [dict(zip(names, row, strict=True)) for row in rows],
        }
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
