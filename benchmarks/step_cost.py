"""What a Booster step costs beyond its three passes, side by side with rivals in one process.

Contestants take turns, one step each in every round, each on a copy of the same model:

* ``floor``: three plain forward and backward passes and the base step, no arithmetic;
* ``booster``: ``BoosterOptimizer`` in one call, and ``booster, staged`` with ``regularize``;
* ``reference way``: the recipe as the method's published code does it, written here from its
  description: dictionaries of cloned gradients by name, arithmetic tensor by tensor, weights
  restored by adding the perturbation back;
* ``SAM``: the nearest popular peer, from ``pytorch_optimizer``, which makes two passes;
* ``plain``: one pass and the base step.

Times are paired by round and given as medians with quartiles; ratios are medians of the ratios of
a round. "Arithmetic" is what a step takes beyond the floor's: there the closures write gradients
without a model, so that it shows. Memory is counted, not sampled: the peak of what tensors hold
during a step beyond weights, gradients and optimizer state, in units of the trainable bytes.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --cases arithmetic-large arithmetic-many --rounds 50
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.live_memory import peak_bytes
from torch_booster import BoosterOptimizer

LAM, ALPHA = 5.0, 0.1
Closure = Callable[[], Tensor]


# --------------------------------------------------------------------------------------- cases


class Problem(NamedTuple):
    """Trainable parameters and the two losses on them, as closures that accumulate."""

    module: nn.Module
    alignment: Closure
    harmful: Closure
    optimizer: Callable[[list[Tensor]], Optimizer]

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def trainable_bytes(self) -> int:
        """Bytes of what is trained."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


def language_model(device: str, size: str) -> nn.Module:
    """A stack of Llama blocks with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (256, 4, 2_000) if size == "small" else (2048, 16, 32_000)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device)


def _on_batches(model: Any, device: str, autocast: bool, length: int) -> Problem:
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().num_embeddings

    def batch() -> Tensor:
        return torch.randint(vocabulary, (10, length), generator=generator).to(device)

    def loss_on(ids: Tensor) -> Tensor:
        cast = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
        with cast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    fused = partial(AdamW, lr=1e-4, fused=True)
    return Problem(model, partial(loss_on, batch()), partial(loss_on, batch()), fused)


def lora(
    device: str, size: str, autocast: bool = False, rank: int = 32, length: int | None = None
) -> Problem:
    """The paper's adapter (r = 32 on q, k and v) on a Llama stack."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(language_model(device, size), config)  # pyright: ignore[reportArgumentType]
    return _on_batches(model, device, autocast, length or (64 if size == "small" else 256))


def full(device: str, size: str) -> Problem:
    """All weights of the Llama stack."""
    return _on_batches(language_model(device, size), device, False, 64)


class Layers(nn.Module):
    """Many small layers, so that calls cost more than what they compute."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) through all layers."""
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def tiny(device: str, size: str) -> Problem:
    """2,000 tensors of 64 elements."""
    del size
    module = Layers(2_000).to(device)
    x, y = torch.randn(2, 4, 8, device=device)

    def loss_on(target: Tensor) -> Tensor:
        loss = (module(x) - target).square().mean()
        loss.backward()
        return loss.detach()

    return Problem(module, partial(loss_on, y), partial(loss_on, -y), partial(AdamW, lr=1e-4))


class Written(torch.autograd.Function):
    """A loss of nothing, whose backward pass hands out gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *params: Tensor) -> Tensor:
        """Zero."""
        ctx.gradients = gradients
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """The gradients."""
        return None, *ctx.gradients


def arithmetic(tensors: int, elements: int, device: str, size: str) -> Problem:
    """Closures that write gradients through autograd and compute nothing."""
    del size
    torch.manual_seed(0)
    module = nn.Module()
    module.weights = nn.ParameterList(
        [torch.randn(elements, device=device) for _ in range(tensors)]
    )
    params = list(module.parameters())
    gradients = [torch.randn_like(p) for p in params]

    def write() -> Tensor:
        loss = Written.apply(gradients, *params)
        loss.backward()
        return loss.detach()

    return Problem(module, write, write, partial(SGD, lr=1e-6))


CASES: dict[str, Callable[[str, str], Problem]] = {
    "lora": lora,
    "full": full,
    "bf16": partial(lora, autocast=True),
    "tiny": tiny,
    "arithmetic-large": partial(arithmetic, 192, 131_072),
    "arithmetic-many": partial(arithmetic, 2_000, 64),
}


# --------------------------------------------------------------------------------- contestants


def floor(problem: Problem) -> Closure:
    """Three passes and the base step."""
    optimizer = problem.optimizer(problem.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        problem.harmful()
        problem.harmful()
        loss = problem.alignment()
        optimizer.step()
        return loss

    return step


def booster(problem: Problem, **options: Any) -> Closure:
    """`BoosterOptimizer` in one call."""
    optimizer = BoosterOptimizer(
        problem.optimizer(problem.parameters()), LAM, ALPHA, self_check=False, **options
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        return optimizer.step(problem.alignment, problem.harmful)

    return step


def booster_staged(problem: Problem) -> Closure:
    """`BoosterOptimizer` in stages."""
    optimizer = BoosterOptimizer(
        problem.optimizer(problem.parameters()), LAM, ALPHA, self_check=False
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        optimizer.regularize(problem.harmful)
        loss = problem.alignment()
        optimizer.step()
        return loss

    return step


def reference_way(problem: Problem) -> Closure:
    """The recipe tensor by tensor, with gradients cloned by name and weights added back."""
    named = {n: p for n, p in problem.module.named_parameters() if p.requires_grad}
    optimizer = problem.optimizer(list(named.values()))

    def harmful_gradients() -> dict[str, Tensor]:
        problem.harmful()
        gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        optimizer.zero_grad()
        return gradients

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            first = harmful_gradients()
        norm = torch.stack([g.norm(2) for g in first.values()]).norm(2) + 1e-7
        with torch.no_grad():
            for name, p in named.items():
                p.sub_(ALPHA * first[name] / norm)
        second = harmful_gradients()
        with torch.no_grad():
            for name, p in named.items():
                p.add_(ALPHA * first[name] / norm)
        loss = problem.alignment()
        with torch.no_grad():
            for name, p in named.items():
                p.grad = p.grad + LAM * first[name] - LAM * second[name]
        optimizer.step()
        return loss

    return step


def sam(problem: Problem) -> Closure | None:
    """Sharpness-aware minimisation of f alone: two passes."""
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        return None
    built = problem.optimizer(problem.parameters())
    options = {k: v for k, v in built.defaults.items() if k in ("lr", "fused")}
    optimizer = SAM(problem.parameters(), type(built), rho=ALPHA, **options)
    optimizer.base_optimizer.state = built.state  # which the contestants of a problem may share

    def again() -> Tensor:
        optimizer.zero_grad()
        return problem.alignment()

    def step() -> Tensor:
        loss = again()
        optimizer.step(again)
        return loss

    return step


def plain(problem: Problem) -> Closure:
    """One pass and the base step."""
    optimizer = problem.optimizer(problem.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = problem.alignment()
        optimizer.step()
        return loss

    return step


CONTESTANTS: dict[str, Callable[[Problem], Closure | None]] = {
    "floor": floor,
    "booster": booster,
    "booster, staged": booster_staged,
    "reference way": reference_way,
    "SAM": sam,
    "plain": plain,
}


# ----------------------------------------------------------------------------------- measuring


def measure(case: str, args: argparse.Namespace, advance: Callable[[], None]) -> dict[str, Any]:
    """Times and memory of every contestant on one case."""
    steps: dict[str, Closure] = {}
    problems = {name: CASES[case](args.device, args.size) for name in CONTESTANTS}
    for name, contestant in CONTESTANTS.items():
        step = contestant(problems[name])
        if step is not None:
            steps[name] = step
    trainable = problems["floor"].trainable_bytes()
    seconds = in_turn(steps, args, advance)
    result: dict[str, Any] = {"case": case, "trainable_bytes": trainable, "contestants": {}}
    for name, step in steps.items():
        problems[name].module.zero_grad()
        peak = peak_bytes(step, args.device)
        result["contestants"][name] = {
            "seconds": seconds[name],
            "extra_memory": peak / trainable - 1,  # the gradients themselves
            "operators": operators(step)
            if args.device == "cpu" and case.startswith("arithmetic")
            else {},
        }
    if args.device == "cuda":
        for name in ("booster", "booster, staged"):
            with _no_synchronisation():
                steps[name]()
    return result


def in_turn(
    steps: dict[str, Closure], args: argparse.Namespace, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each contestant's steps, all of them taking one step in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.warm_up + args.rounds):
        for name, step in steps.items():
            taken = timed(step, args.device)
            if round_ >= args.warm_up:
                seconds[name].append(taken)
        advance()
    return seconds


def operators(step: Closure) -> dict[str, float]:
    """Milliseconds of the CPU within each operator of a step, its callees not counted."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}


def timed(step: Closure, device: str) -> float:
    """Seconds of one step."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------- table


def over(result: dict[str, Any], name: str, other: str) -> float:
    """Median over the rounds of the ratio of two contestants' times."""
    a, b = (result["contestants"][n]["seconds"] for n in (name, other))
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def beyond(result: dict[str, Any], name: str) -> float:
    """Median over the rounds of the seconds beyond the floor's."""
    a, b = (result["contestants"][n]["seconds"] for n in (name, "floor"))
    return statistics.median(x - y for x, y in zip(a, b, strict=True))


def less(result: dict[str, Any], name: str = "booster") -> float:
    """How many times less a contestant takes beyond the floor than the reference way does."""
    return beyond(result, "reference way") / beyond(result, name)


TARGETS: dict[str, list[tuple[str, Callable[[dict[str, Any]], float], str, float]]] = {
    "lora": [("step / floor", lambda r: over(r, "booster", "floor"), "≤", 1.02)],
    "full": [("step / floor", lambda r: over(r, "booster", "floor"), "≤", 1.05)],
    "arithmetic-large": [("times less arithmetic than the reference way", less, "≥", 4.0)],
    "arithmetic-many": [("times less arithmetic than the reference way", less, "≥", 4.0)],
}


def table(results: list[dict[str, Any]]) -> Table:
    """All contestants of all cases."""
    view = Table(title="Cost of a step")
    for head in ("case", "contestant", "ms [quartiles]", "/ floor", "/ plain", "ms beyond floor"):
        view.add_column(head, justify="left" if head in ("case", "contestant") else "right")
    view.add_column("extra memory", justify="right")
    for result in results:
        for name, contestant in result["contestants"].items():
            low, median, high = statistics.quantiles(contestant["seconds"], n=4)
            view.add_row(
                result["case"],
                name,
                f"{1e3 * median:.2f} [{1e3 * low:.2f}, {1e3 * high:.2f}]",
                f"{over(result, name, 'floor'):.3f}",
                f"{over(result, name, 'plain'):.2f}",
                f"{1e3 * beyond(result, name):+.2f}",
                f"{contestant['extra_memory']:.2f} x",
                end_section=name == "plain",
            )
    return view


def targets(results: list[dict[str, Any]]) -> Table:
    """What was aimed at beside what was measured."""
    view = Table(title="Targets")
    for head in ("case", "what", "target", "measured", ""):
        view.add_column(head)
    for result in results:
        peaks = {name: c["extra_memory"] for name, c in result["contestants"].items()}
        extra = peaks["booster"] - peaks["floor"]  # the floor's are the model's activations
        memory = (
            "memory beyond the floor's, accumulating closures",
            lambda _, e=extra: e,
            "≤",
            1.01,  # the 0.01 for numbers that a step holds for each tensor
        )
        for what, of, sign, goal in [*TARGETS.get(result["case"], []), memory]:
            found = of(result)
            met = found <= goal if sign == "≤" else found >= goal
            view.add_row(
                result["case"], what, f"{sign} {goal}", f"{found:.3f}", "met" if met else "missed"
            )
    return view


def profiles(results: list[dict[str, Any]], shown: int = 8) -> Table:
    """Where the time of a step of closures that only write gradients goes."""
    view = Table(title="Milliseconds within torch's operators, profiled, one step")
    for head in ("case", "operator", "floor", "booster", "reference way"):
        view.add_column(head, justify="left" if head in ("case", "operator") else "right")
    for result in results:
        columns = [result["contestants"][n]["operators"] for n in ("floor", "booster")]
        columns.append(result["contestants"]["reference way"]["operators"])
        by_booster = sorted(columns[1], key=lambda op: -columns[1][op])
        for operator in by_booster[:shown]:
            found = (f"{column.get(operator, 0.0):.2f}" for column in columns)
            view.add_row(result["case"], operator, *found)
        if columns[0]:
            total = (f"{sum(column.values()):.2f}" for column in columns)
            view.add_row(result["case"], "all", *total, end_section=True)
    return view


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Options of a benchmark whose contestants take steps in turn."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each contestant")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them")
    parser.add_argument("--device", default=device)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked, and its number of threads set."""
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.warm_up < 1:
        parser.error("--rounds must be at least 2 and --warm_up at least 1")
    torch.set_num_threads(args.threads)
    return args


def write(
    args: argparse.Namespace, argv: list[str] | None, script: str, found: dict[str, Any]
) -> None:
    """Writes what was found, and how, to the file of `--output`."""
    command = ["python", f"benchmarks/{script}", *(sys.argv[1:] if argv is None else argv)]
    record = {
        "command": command,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "torch_booster": version("torch_booster")},
        **found,
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--size",
        choices=["small", "large"],
        default="large" if torch.cuda.is_available() else "small",
        help="of the Llama stack: 4 layers of width 256, or 16 of 2,048",
    )
    parser.add_argument("--output", default="step_cost.json", help="where the raw times go")
    args = parsed(parser, argv)

    console = Console()
    results: list[dict[str, Any]] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("rounds", total=len(args.cases) * (args.rounds + args.warm_up))
            for case in args.cases:
                results.append(measure(case, args, lambda: progress.advance(task)))
                gc.collect()
    except KeyboardInterrupt:
        console.print("Interrupted: nothing is written, since a part of a comparison is none.")
        return 130
    write(args, argv, "step_cost.py", {"results": results})
    console.print(table(results), targets(results), profiles(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
