"""What a step costs on the device beyond its passes, beside rivals, on Llamas of the usual sizes.

All contestants train one model, with one optimizer state, and take a step each in every round, so
that what the machine does meanwhile falls on all of them and memory holds a large model. They are
those of ``benchmarks/step_cost.py``, and the Booster of three options.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.jobs import Job, Keep, Record, Skipped
from benchmarks.live_memory import peak_bytes
from benchmarks.step_cost import (
    CONTESTANTS,
    Closure,
    Problem,
    beyond,
    booster,
    over,
    timed,
)

__all__ = ["CASES", "jobs", "show"]

BATCH, LENGTH = 10, 256  # the paper's, in samples and tokens
WARM_UP, ROUNDS, FEWEST = 1, 20, 3
PASS = "pass"  # the name of a pass in the profile

# width, width within, layers, heads, heads of keys and values, vocabulary
SIZES = {
    "toy": (32, 64, 2, 2, 1, 50),
    "135M": (576, 1536, 30, 9, 3, 49_152),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "7B": (4096, 11_008, 32, 32, 32, 32_000),
}


class Case(NamedTuple):
    """A model, what of it is trained and in which dtype, and seconds for the whole of it."""

    size: str
    adapters: bool
    dtype: torch.dtype
    seconds: float


CASES = {
    "LoRA, 135M": Case("135M", True, torch.bfloat16, 20),
    "LoRA, 1B": Case("1B", True, torch.bfloat16, 25),
    "LoRA, 7B": Case("7B", True, torch.bfloat16, 60),
    "all weights, 135M": Case("135M", False, torch.bfloat16, 20),
    "all weights, 1B": Case("1B", False, torch.bfloat16, 30),
    "all weights in float32, 135M": Case("135M", False, torch.float32, 20),
    "all weights in float32, 1B": Case("1B", False, torch.float32, 30),
    "all weights, 7B": Case("7B", False, torch.bfloat16, 70),
}
"""In the order of what is wanted most; the last fits an H200 alone. The passes are in bfloat16, by
autocast; adapters are in float32, as PEFT makes them."""

RIVALS: dict[str, Callable[[Problem], Closure | None]] = {
    **CONTESTANTS,
    "booster, accumulates": partial(booster, accumulates=True),
    "booster, norm by tensor": partial(booster, norm="tensor"),
    "booster, every=4": partial(booster, every=4),
}
IN_A_TURN = {"booster, every=4": 4}
"""Steps of a turn, where one step is not like the next."""
LOOKED_INTO = ("floor", "booster", "reference way", "booster, staged", "booster, accumulates")
"""Whose steps are taken apart, as far as time allows: a profile takes seconds to read."""
OF_OTHERS = ("SAM",)
"""Whose errors are theirs, and end nothing here."""

BYTES = {"booster": 64, "booster, accumulates": 72}
"""Read and written for each trained float32 weight in one call beyond the floor: of ∇h(w) a copy
(8) and the norm (4); the copy of w (8); w′ in three operators (8 + 8 + 12); restoring w (8); the
difference (12); λ (8); adding it (12); less two accumulations that the floor's passes make, each
onto the last (2 · 12). Where closures accumulate, signs are changed twice (2 · 8) and a pass adds
onto ∇h(w) (12), in the place of the copy and the difference."""
TARGETS: list[tuple[str, str, float]] = [
    ("booster", "step / floor", 1.02),
    ("booster", "synchronisations", 0),
    ("booster", "copies", 2.01),  # the 0.01 for numbers that a step holds for each tensor
    ("booster, accumulates", "copies", 1.01),
]


# ------------------------------------------------------------------------------------ one model


def llama(size: str, dtype: torch.dtype, device: str) -> Any:
    """A Llama with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, within, layers, heads, groups, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=within,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=size in ("135M", "1B"),
        use_cache=False,
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(usual)


def weights_of(case: Case) -> tuple[int, int]:
    """Weights in all and those that are trained, without making them."""
    width, within, layers, heads, groups, vocabulary = SIZES[case.size]
    shared = width // heads * groups
    block = 2 * width * width + 2 * width * shared + 3 * width * within
    tied = case.size in ("135M", "1B")
    whole = layers * block + (2 * layers + 1) * width + vocabulary * width * (1 if tied else 2)
    adapters = layers * 32 * ((width + width) + 2 * (width + shared))
    return (whole + adapters, adapters) if case.adapters else (whole, whole)


def bytes_of(case: Case) -> int:
    """What a case holds at most, generously: so that what does not fit is told and not tried.

    Beside the weights: gradients, two moments and the copies of the contestant that makes most, the
    reference's way; activations of a pass, for which nothing is computed anew; logits and their
    gradients in bfloat16 and float32.
    """
    width, within, layers, *_, vocabulary = SIZES[case.size]
    whole, trained = weights_of(case)
    wide = 4 if case.adapters else case.dtype.itemsize
    tokens = BATCH * LENGTH
    activations = tokens * layers * (24 * width + 8 * within) * 2
    return whole * case.dtype.itemsize + 6 * trained * wide + activations + tokens * vocabulary * 16


class Passes:
    """Two closures on one model that tell when a pass begins and ends."""

    def __init__(self, model: Any, device: str, batch: int, length: int) -> None:
        self.began: Callable[[], object] = lambda: None
        self.ended: Callable[[], object] = lambda: None
        self._model, self._device = model, device
        vocabulary = model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(vocabulary, (2, batch, length), generator=generator)
        self._batches = drawn.to(device)

    def closure(self, which: int) -> Closure:
        """Forward and backward on a batch of its own."""
        ids = self._batches[which]

        def run() -> Tensor:
            self.began()
            with record_function(PASS):
                with torch.autocast(self._device, torch.bfloat16):
                    loss = self._model(input_ids=ids, labels=ids).loss
                loss.backward()
            self.ended()
            return loss.detach()

        return run

    @contextmanager
    def telling(self, began: Callable[[], object], ended: Callable[[], object]) -> Iterator[None]:
        """Context in which they tell these."""
        self.began, self.ended = began, ended
        try:
            yield
        finally:
            self.began = self.ended = lambda: None


def problem_of(case: Case, device: str) -> tuple[Problem, Passes]:
    """The training of a case."""
    model = llama(case.size, case.dtype, device)
    if case.adapters:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=32, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"])
        model = get_peft_model(model, config)
    toy = case.size == "toy"
    passes = Passes(model, device, *((2, 8) if toy else (BATCH, LENGTH)))
    shared: Any = defaultdict(dict[str, Any])

    def optimizer(params: list[Tensor]) -> Optimizer:
        built = AdamW(params, lr=1e-6, fused=True)
        built.state = shared  # one for all, for memory's sake; each step is as long with any
        return built

    return Problem(model, passes.closure(0), passes.closure(1), optimizer), passes


# ----------------------------------------------------------------------------------- measuring


def measure(case: Case, device: str, seconds: float, keep: Keep) -> Record:
    """Times, memory, launches and synchronisations of all contestants on one case.

    Raises:
        Skipped: It does not fit into the device's free memory.
    """
    started = time.monotonic()
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info()[0], bytes_of(case)
        if needed > free:
            raise Skipped(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    problem, passes = problem_of(case, device)
    trained = problem.trainable_bytes()
    found: Record = {
        "case": case._replace(dtype=str(case.dtype))._asdict(),
        "trainable_bytes": trained,
        "trained_weights": sum(p.numel() for p in problem.parameters()),
        "trained_dtype": str(problem.parameters()[0].dtype),
        "bytes_a_second": copying(device),
        "contestants": {},
    }
    steps = {name: made for name, of in RIVALS.items() if (made := of(problem)) is not None}
    absent = found["absent"] = {n: "its package is absent" for n in RIVALS if n not in steps}
    turns = {name: turn(step, IN_A_TURN.get(name, 1)) for name, step in steps.items()}
    for name, take in [*turns.items()]:  # makes the optimizer's state, and loads the kernels
        try:
            take()
        except Exception as error:
            if name not in OF_OTHERS:
                raise
            absent[name] = repr(error)
            del steps[name], turns[name]
    for name, step in steps.items():
        problem.module.zero_grad()
        peak = peak_bytes(step, device) / trained - 1  # the gradients themselves
        found["contestants"][name] = {"seconds": [], "peak": peak}
    at_floor = found["contestants"]["floor"]["peak"]  # the model's activations
    for entry in found["contestants"].values():
        entry["copies"] = entry["peak"] - at_floor
    keep(found)
    rounds(found, turns, device, started + 0.75 * seconds)
    keep(found)
    for name in LOOKED_INTO:
        if time.monotonic() > started + seconds:
            break
        found["contestants"][name] |= between(steps[name], passes, device)
    del problem, passes, steps, turns
    gc.collect()
    return found


def turn(step: Closure, steps: int) -> Closure:
    """Some steps at a time."""

    def take() -> Tensor:
        for _ in range(steps - 1):
            step()
        return step()

    return take


def rounds(found: Record, turns: dict[str, Closure], device: str, ends: float) -> None:
    """One turn of each contestant in every round, until all rounds are done or time is up."""
    wanted = WARM_UP + (ROUNDS if device == "cuda" else FEWEST)
    for round_ in range(wanted):
        began = time.monotonic()
        for name, take in turns.items():
            taken = timed(take, device) / IN_A_TURN.get(name, 1)
            if round_ >= WARM_UP:
                found["contestants"][name]["seconds"].append(taken)
        now = time.monotonic()
        if round_ + 1 >= WARM_UP + FEWEST and now + (now - began) > ends:
            print(f"  {round_ + 1 - WARM_UP} of {ROUNDS} rounds, for want of time", flush=True)
            break
    for entry in found["contestants"].values():
        entry["median"] = statistics.median(entry["seconds"])


def between(step: Closure, passes: Passes, device: str) -> Record:
    """What happens outside the passes of a step: seconds, operators, launches, synchronisations."""
    spent = min(outside(step, passes, device) for _ in range(2))
    counted = profiled(step, device)
    return {
        "seconds_between": spent,
        **counted,
        "synchronisations": waits(step, passes) if device == "cuda" else None,
    }


def outside(step: Closure, passes: Passes, device: str) -> float:
    """Seconds of a step outside its passes."""
    marks: list[Any] = []

    def now() -> None:
        marks.append(mark(device))

    with passes.telling(now, now):
        now()
        step()
        now()
    if device == "cuda":
        torch.cuda.synchronize()
    return sum(apart(a, b) for a, b in list(pairwise(marks))[::2])


def mark(device: str) -> Any:
    """A moment, on the device where there is one."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def apart(a: Any, b: Any) -> float:
    """Seconds from one moment to another."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def profiled(step: Closure, device: str) -> Record:
    """Operators, launches and waits of a step outside its passes, from a profile."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        with record_function("step"):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = [e for e in profiler.events() or [] if e.device_type.name == "CPU"]
    spans = [e.time_range for e in events if e.name == PASS]
    whole = next(e.time_range for e in events if e.name == "step")
    # On one thread: the backward pass has another, while the first waits within the pass.
    inside = [e for e in events if whole.start <= e.time_range.start < whole.end]
    between = [
        e.name
        for e in inside
        if not any(span.start <= e.time_range.start < span.end for span in spans)
    ]
    return {
        "passes": len(spans),
        "operators_between": sum(name.startswith("aten::") for name in between),
        "launches_between": sum("LaunchKernel" in name for name in between),
        "copies_between": sum("MemcpyAsync" in name for name in between),
        "waits_between": sum("Synchronize" in name for name in between),
    }


def waits(step: Closure, passes: Passes) -> int:
    """How often torch waits for the device outside the passes of a step, by its debug mode."""
    set_mode = torch.cuda.set_sync_debug_mode
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.synchronize()
        with passes.telling(lambda: set_mode("default"), lambda: set_mode("warn")):
            set_mode("warn")
            try:
                step()
            finally:
                set_mode("default")
    return sum("synchroniz" in str(w.message) for w in said)


def copying(device: str) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(2**28 if device == "cuda" else 2**16, device=device)
    into = torch.empty_like(source)

    def copy() -> Tensor:
        return into.copy_(source)

    taken = [timed(copy, device) for _ in range(6)][1:]
    return 2 * source.numel() * source.element_size() / statistics.median(taken)


# --------------------------------------------------------------------------------------- showing


def jobs() -> dict[str, Job]:
    """All cases."""
    return {name: Job(partial(_measured, name), case.seconds + 15) for name, case in CASES.items()}


def _measured(name: str, device: str, limit: float, keep: Keep) -> Record:
    case = CASES[name]
    if device == "cpu":
        case = case._replace(size="toy")
    if limit < case.seconds / 2:
        raise Skipped(f"{limit:.0f} s are left of {case.seconds:.0f}")
    return measure(case, device, min(case.seconds, limit) if device == "cuda" else limit, keep)


def predicted(found: Record, name: str) -> float | None:
    """Seconds beyond the floor by the count of bytes, for float32 weights."""
    if name not in BYTES or found["trained_dtype"] != "torch.float32":
        return None
    return BYTES[name] * found["trained_weights"] / found["bytes_a_second"]


def table(record: Record) -> Table:
    """All contestants of all cases."""
    view = Table(title=f"Cost of a step on {record['device'].get('name', 'no device')}")
    view.add_column("case")
    view.add_column("contestant")
    for head in ("ms", "/ floor", "/ plain", "ms beyond", "counted", "copies", "launches", "waits"):
        view.add_column(head, justify="right")
    for result in record["jobs"]:
        for name, entry in result.get("contestants", {}).items():
            if "median" not in entry:
                continue
            count = predicted(result, name)
            view.add_row(
                *(result["name"], name, f"{1e3 * entry['median']:.2f}"),
                *(f"{over(result, name, other):.3f}" for other in ("floor", "plain")),
                f"{1e3 * beyond(result, name):+.2f}",
                "" if count is None else f"{1e3 * count:.2f}",
                f"{entry['copies']:.2f}",
                *(str(entry.get(what, "")) for what in ("launches_between", "synchronisations")),
                end_section=name == list(result["contestants"])[-1],
            )
    return view


def targets(record: Record) -> Table:
    """What was aimed at beside what was measured."""
    view = Table(title="Targets")
    for head in ("case", "contestant", "what", "at most", "measured", ""):
        view.add_column(head)
    for result in record["jobs"]:
        for name, what, goal in TARGETS:
            entry = result.get("contestants", {}).get(name, {})
            if "median" not in entry or what not in {"step / floor", *entry}:
                continue
            value = over(result, name, "floor") if what == "step / floor" else entry[what]
            if value is not None:
                said = "met" if value <= goal else "missed"
                view.add_row(result["name"], name, what, f"{goal}", f"{value:.3f}", said)
    return view


def show(record: Record) -> None:
    """Prints both tables."""
    Console(width=150).print(table(record), targets(record))
