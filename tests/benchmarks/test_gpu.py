"""The checks and the costs of an accelerator, rehearsed on the CPU at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="the examples extra is absent")

from benchmarks.gpu import __main__, check, cost, jobs
from benchmarks.gpu.jobs import Job, Keep, Record, Skipped
from torch_booster import optimizer

# PEFT asks transformers for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).parents[2]
HERE = ROOT / "benchmarks" / "gpu"
ABSENT = "the examples extra is absent"
NEED_CUDA = {"no synchronisation", "mixed devices", "DDP, NCCL, one process"}


def run(command: str, tmp_path: Path, *argv: str) -> tuple[int, Record]:
    output = tmp_path / "record.json"
    status = __main__.main([command, "--device", "cpu", "--output", str(output), *argv])
    return status, json.loads(output.read_text())


# ------------------------------------------------------------------------------------ rehearsals


def test_every_check_runs_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason=ABSENT)
    status, record = run("check", tmp_path)
    statuses = {job["name"]: job["status"] for job in record["jobs"]}
    assert status == 0, [job.get("error") for job in record["jobs"]]
    assert list(statuses) == list(check.CHECKS)
    assert {name for name, status in statuses.items() if status == "skipped"} == NEED_CUDA
    assert record["device"]["versions"]["torch"] == torch.__version__


def test_costs_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason=ABSENT)
    cases = ["LoRA, 7B", "all weights, 1B", "all weights in float32, 1B"]
    status, record = run("cost", tmp_path, "--only", *cases)
    assert status == 0, [job.get("error") for job in record["jobs"]]
    passes = {"floor": 3, "booster": 3, "booster, staged": 3, "reference way": 3}
    for job in record["jobs"]:
        found = job["contestants"]
        assert {*found} | {*job["absent"]} == {*cost.RIVALS}
        assert all(len(entry["seconds"]) == cost.FEWEST for entry in found.values())
        assert {name: found[name]["passes"] for name in passes} == passes
        assert all(found[name]["seconds_between"] > 0 for name in cost.LOOKED_INTO)
        assert found["booster"]["operators_between"] > found["floor"]["operators_between"]
        assert found["plain"]["copies"] < 0 < found["booster"]["copies"] < 1.5
    assert {job["trained_dtype"] for job in record["jobs"]} == {"torch.float32", "torch.bfloat16"}
    shown = capsys.readouterr().out
    assert "Targets" in shown
    assert shown.count("booster, every=4") == len(cases)


def test_the_wide_and_deep_experiment_runs_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason=ABSENT)
    from benchmarks.harmful_finetuning import __main__ as harmful_finetuning

    config = ["--config", str(HERE / "wide_deep.json")]
    argv = ["run", "recommended", *config, "--device", "cpu", "--seeds", "0", "--workers", "1"]
    chosen = harmful_finetuning._parsed(argv).tuned
    assert (chosen.base.width, chosen.base.layers, chosen.trained) == (1024, 8, "full")
    assert chosen.given_to("booster") == {"lam": 1.0, "alpha": 0.1}
    places = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "output")]
    base = ["--base.width", "32", "--base.layers", "1", "--base.steps", "2"]
    steps = ["--base.batch_size", "8", "--align.steps", "2", "--attack.steps", "1"]
    score = ["--attack.samples", "40", "--score.samples", "4", "--score.max_new_tokens", "2"]
    methods = ["--methods", "sft", "booster", "booster_warmed", "booster_recommended"]
    assert " ".join(methods) in (HERE / "on_device.sh").read_text()
    assert harmful_finetuning.main([*argv, *methods, *places, *base, *steps, *score]) == 0
    assert len(list((tmp_path / "cache").glob("run-*.json"))) == 4


# ----------------------------------------------------------------------------- checks can fail


def test_a_step_in_the_wrong_direction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = optimizer.perturb_

    def wrong(live: list[Tensor], w: list[Tensor], g: list[Tensor], sizes: Tensor) -> Any:
        return right(live, w, g, -sizes)

    monkeypatch.setattr(optimizer, "perturb_", wrong)
    with pytest.raises(AssertionError, match="norm global: distance is"):
        check.formula(torch.float64, "cpu")


def test_weights_that_do_not_come_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "copying", lambda into, values: lambda: None)
    with pytest.raises(AssertionError, match="have not come back bit for bit"):
        check.formula(torch.float64, "cpu")


def test_what_the_package_warns_of_fails_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(device: str) -> Record:
        warnings.warn("This step had no regulariser although ...", stacklevel=1)
        return {}

    monkeypatch.setitem(check.CHECKS, "warns", (warns, 1.0))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="no regulariser"):
        check._checked("warns", "cpu", 1.0, lambda found: None)


# ---------------------------------------------------------------------------------------- jobs


def finds(device: str, limit: float, keep: Keep) -> Record:
    return {"found": [device, limit > 1]}


def fails(device: str, limit: float, keep: Keep) -> Record:
    keep({"partly": 1})
    raise ValueError("by the test")


def hangs(device: str, limit: float, keep: Keep) -> Record:
    keep({"partly": 2})
    time.sleep(600)
    return {}


def dies(device: str, limit: float, keep: Keep) -> Record:
    os._exit(7)


def skips(device: str, limit: float, keep: Keep) -> Record:
    raise Skipped("for a reason")


def test_whatever_a_job_does_the_next_one_is_run(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "record.json"
    functions: list[Callable[..., Record]] = [skips, fails, finds, hangs, dies]
    limits = {hangs: 0.5}
    wanted = {f"{i}": Job(f, limits.get(f, 200.0)) for i, f in enumerate(functions)}
    record = jobs.run(wanted, "cpu", 600.0, output, {"about": 1})
    assert json.loads(output.read_text()) == record
    rows = record["jobs"]
    statuses = ["skipped", "failed", "passed", "timed out", "failed"]
    assert [row["status"] for row in rows] == statuses
    assert rows[0]["reason"] == "for a reason"
    assert "ValueError: by the test" in rows[1]["error"]
    assert rows[2]["found"] == ["cpu", True]
    assert (rows[1]["partly"], rows[3]["partly"]) == (1, 2)
    assert "exit code 7" in rows[4]["error"]
    assert not jobs.passed(record)


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    record = jobs.run({"late": Job(finds, 9.0)}, "cpu", 0.0, tmp_path / "record.json", {})
    assert [job["status"] for job in record["jobs"]] == ["not run"]
    assert not jobs.passed(record)


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, *_: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_Worker", Interrupted)
    status, record = run("check", tmp_path)
    assert status == 130
    assert [job["status"] for job in record["jobs"]] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["check", "--only", "nothing"], "no part is called 'nothing'; there are: formula"),
        (["cost", "--limit", "0"], "--limit is 0.0, expected seconds above 0"),
        (["check", "--device", "cuda"], "no CUDA device is there"),
    ],
)
def test_arguments_are_refused(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    with pytest.raises(SystemExit):
        __main__.main(argv)
    assert said in capsys.readouterr().err


# --------------------------------------------------------- what only runs where there is a device


class Modes:
    """The debug mode of a device that waits: it does what it is told where that is allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode = "default"
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", partial(setattr, self, "mode"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def wait(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def test_waits_between_the_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason=ABSENT)
    modes = Modes(monkeypatch)
    passes = cost.Passes(cost.llama("toy", torch.float32, "cpu"), "cpu", 1, 4)

    def step() -> Tensor:
        modes.wait()
        passes.began()
        modes.wait()  # the model's own
        passes.ended()
        modes.wait()
        return torch.zeros(())

    assert cost.waits(step, passes) == 2
    assert modes.mode == "default"


def test_the_check_of_waits_looks_whether_it_could_find_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = Modes(monkeypatch)
    with check.refusing_synchronisation("cuda"), pytest.raises(RuntimeError, match="synchroniz"):
        modes.wait()
    assert modes.mode == "default"
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(()))  # whose .item() is let by
    with pytest.raises(AssertionError, match=r"let \.item\(\) pass"):
        check.expect_the_device_to_tell()


def test_moments_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert cost.apart(cost.mark("cuda"), cost.mark("cuda")) == 5e-3


def test_a_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 2))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "name")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = jobs._described("cuda")
    assert (found["name"], found["bytes"], found["free_bytes"]) == ("name", 2, 1)


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(Skipped, match=r"needs about \d+ GB, 80 GB are free"):
        cost.measure(cost.CASES["all weights, 7B"], "cuda", 60.0, lambda found: None)
    fits = {name for name, case in cost.CASES.items() if cost.bytes_of(case) < 78 * 2**30}
    assert fits == {*cost.CASES} - {"all weights, 7B"}
    assert cost.bytes_of(cost.CASES["all weights, 7B"]) < 139 * 2**30


@pytest.mark.parametrize("name", ["LoRA, 135M", "all weights, 1B", "all weights, 7B", "LoRA, 7B"])
def test_weights_are_counted_as_the_model_has_them(name: str) -> None:
    pytest.importorskip("peft", reason=ABSENT)
    case = cost.CASES[name]
    problem, _ = cost.problem_of(case, "meta")
    every = sum(p.numel() for p in problem.module.parameters())
    assert cost.weights_of(case) == (every, sum(p.numel() for p in problem.parameters()))


# ------------------------------------------------------------------------------------- the script


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a copy of the script, in a tree with nothing built, with a Python that tells."""
    copy = tmp_path / "benchmarks" / "gpu" / "on_device.sh"
    copy.parent.mkdir(parents=True)
    copy.write_text((HERE / "on_device.sh").read_text())
    python = tmp_path / "python"
    told = '[ -z "$PIP_FIND_LINKS" ] || cat "$PIP_FIND_LINKS"/*.whl; echo "$@"; exit 3'
    python.write_text(f"#!/bin/sh\n{told}\n")
    python.chmod(0o755)
    env = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    env.pop("PIP_FIND_LINKS", None)

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(copy), *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    return run


Script = Callable[..., subprocess.CompletedProcess[str]]


def test_the_script_says_what_parts_there_are(script: Script) -> None:
    result = script("nothing")
    assert result.returncode == 2
    assert "check, cost, wide-deep or real" in result.stderr


@pytest.mark.parametrize("part", ["check", "cost", "wide-deep"])
def test_the_script_hands_on_what_a_part_ends_with(
    part: str, script: Script, tmp_path: Path
) -> None:
    result = script(part, "--further")
    assert result.returncode == 3, result.stderr
    said = {"wide-deep": "-m benchmarks.harmful_finetuning run recommended"}
    assert said.get(part, f"-m benchmarks.gpu {part}") in result.stdout
    assert "--further" in result.stdout
    assert (tmp_path / "out" / f"{part.replace('-', '_')}.log").read_text() == result.stdout


def test_the_script_puts_the_halves_of_a_model_together(script: Script, tmp_path: Path) -> None:
    absent = script("real")
    assert absent.returncode == 2
    assert "make model-wheel" in absent.stderr

    (tmp_path / "build" / "data").mkdir(parents=True)
    for half in "12":
        folder = tmp_path / "build" / f"model-{half}"
        folder.mkdir()
        (folder / f"half-{half}").write_text(f"[{half}]")
    done = script("real", "--further")
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("[1][2]-m benchmarks.harmful_finetuning run pretrained")
    assert "--further" in done.stdout
    assert (tmp_path / "out" / "real.tar.gz").exists()
