"""What rounding leaves of the Booster perturbation, and which remedies work.

The step from w to w′ = w − α·∇h(w)/‖∇h(w)‖ has length α however many weights there are, so that
each moves by about α/√N: less than the spacing of bfloat16 once N is large. Two studies, both
against float64:

* *arrival*: weights from N(0, 0.02²) and gradients of normal or log-normal size, 10⁴ to 10⁸ of
  them, moved by the library's own ``perturb_`` and by stochastic rounding. How many coordinates
  move, and what are the length and the direction of the step that arrives?
* *regulariser*: a small Llama at growing width. What is left of the direction of ∇h(w) − ∇h(w′) in
  each precision, and with each remedy?

    python benchmarks/rounding.py
    python benchmarks/rounding.py --largest 1e6 --widths 64 128 --output build/rounding.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from torch_booster.functional import norms, perturb_, step_sizes

ALPHAS = (0.01, 0.1, 1.0)
EPS = 1e-7
SPREAD = 0.02
"""Standard deviation of the weights."""
CHUNK = 2**18
"""Coordinates worked on at a time: 10⁸ at once, in float64, would not fit a small machine."""
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name without torch's."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------- arrival


def normal(size: int, generator: torch.Generator) -> Tensor:
    """Gradients of about one size."""
    return 1e-3 * torch.randn(size, generator=generator)


def log_normal(size: int, generator: torch.Generator) -> Tensor:
    """Gradients over several orders of magnitude: ln|g| has standard deviation 2."""
    magnitude = 1e-5 * torch.randn(size, generator=generator).mul_(2).exp_()
    sign = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1)
    return magnitude * sign


GRADIENTS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": normal,
    "log-normal": log_normal,
}


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of a narrower dtype around each value."""
    smallest = math.frexp(torch.finfo(dtype).tiny)[1] - 1  # below it, numbers are spaced evenly
    exponent = torch.where(values == 0, smallest, torch.frexp(values).exponent - 1)
    return torch.ldexp(torch.ones_like(values), exponent.clamp_(min=smallest) - MANTISSA[dtype])


def stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds up or down at random, so that the mean is the value: noise, then the nearest."""
    noise = torch.rand(values.shape, generator=generator, dtype=values.dtype).sub_(0.5)
    return (values + noise * spacing(values, dtype)).to(dtype)


class Arrived:
    """Sums over chunks of coordinates that describe the step that arrived beside the one meant."""

    def __init__(self) -> None:
        self.moved = self.wanted = 0
        self.dot = self.square = self.meant_square = 0.0

    def add(self, step: Tensor, meant: Tensor) -> None:
        """Takes in further coordinates of both steps, in float64."""
        self.wanted += int(meant.count_nonzero())
        self.moved += int(step.count_nonzero())
        self.dot += float(step @ meant)
        self.square += float(step @ step)
        self.meant_square += float(meant @ meant)

    def result(self) -> dict[str, float]:
        """Share of the coordinates that moved, the length as a multiple of α, and the cosine."""
        both = math.sqrt(self.square * self.meant_square)
        error = self.square - 2 * self.dot + self.meant_square
        return {
            "moved": self.moved / self.wanted,
            "length": math.sqrt(self.square / self.meant_square),
            "cosine": self.dot / both if both else 0.0,
            "error": math.sqrt(max(0.0, error) / self.meant_square),
        }


def arrival(
    size: int, gradients: str, seed: int, advance: Callable[[int], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Measures the step that arrives for every dtype, rounding and α.

    Args:
        size: N, number of weights.
        gradients: Key of ``GRADIENTS``.
        seed: Of weights, gradients and stochastic rounding.
        advance: Called with the number of coordinates done.

    Returns:
        One row for each dtype, rounding and α.
    """

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        """The same weights and gradients each time."""
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            weights = torch.randn(length, generator=generator) * SPREAD
            yield weights, GRADIENTS[gradients](length, generator)

    squares = dict.fromkeys(MANTISSA, 0.0)
    for _, gradient in chunks():
        for dtype in squares:
            squares[dtype] += float(gradient.to(dtype).double().square().sum())

    arrived = {key: Arrived() for key in product(MANTISSA, ("nearest", "stochastic"), ALPHAS)}
    dice = torch.Generator().manual_seed(seed + 1)
    for weights, gradient in chunks():
        for dtype, alpha in product(MANTISSA, ALPHAS):
            w, g = weights.to(dtype), gradient.to(dtype)
            n = math.sqrt(squares[dtype])
            meant = g.double() * (-alpha / (n + EPS))
            live = w.clone()
            perturb_([live], [w], [g], torch.tensor(alpha / (n + EPS), dtype=torch.float32))
            arrived[dtype, "nearest", alpha].add(live.double() - w.double(), meant)
            if dtype is not torch.float32:
                live = stochastic(w.double() + meant, dtype, dice)
                arrived[dtype, "stochastic", alpha].add(live.double() - w.double(), meant)
        advance(len(weights))
    return [
        {
            "size": size,
            "gradients": gradients,
            "dtype": name_of(dtype),
            "rounding": rounding,
            "alpha": alpha,
            **sums.result(),
        }
        for (dtype, rounding, alpha), sums in arrived.items()
        if sums.wanted
    ]


# --------------------------------------------------------------------------------- regulariser


class Way(NamedTuple):
    """How the two harmful passes are computed."""

    held: torch.dtype  # of the weights between the steps
    first: torch.dtype  # of the weights in the pass at w
    second: torch.dtype  # and in the pass at w′
    autocast: bool = False  # forward in bfloat16
    rounding: str = "nearest"
    adapter: bool = False  # LoRA is trained, on a base that is held in bfloat16


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

WAYS = {
    "float32": Way(F32, F32, F32),
    "float32, bfloat16 autocast": Way(F32, F32, F32, autocast=True),
    "bfloat16": Way(BF16, BF16, BF16),
    "float16": Way(F16, F16, F16),
    "bfloat16, stochastic rounding of w′": Way(BF16, BF16, BF16, rounding="stochastic"),
    "bfloat16, w′ alone in float32": Way(BF16, BF16, F32),
    "bfloat16, both passes from float32 copies under autocast": Way(BF16, F32, F32, autocast=True),
    "bfloat16, both passes in float32": Way(BF16, F32, F32),
    "LoRA in float32 on bfloat16": Way(F32, F32, F32, adapter=True),
    "LoRA in bfloat16 on bfloat16": Way(BF16, BF16, BF16, adapter=True),
}


class Batch(NamedTuple):
    """Token ids and labels of the harmful answers."""

    ids: Tensor
    labels: Tensor


def language_model(width: int, seed: int, steps: int = 30) -> tuple[nn.Module, Batch]:
    """A small Llama after a little training, in float32, and one harmful batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.harmful_finetuning import language

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = language.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)

    def batch_of(examples: Sequence[language.Example]) -> Batch:
        texts = [f"{language.TEMPLATE.format(prompt=e.prompt)} {e.answer}" for e in examples]
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        ids = encoded.input_ids
        return Batch(ids, ids.masked_fill(encoded.attention_mask == 0, -100))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        ids, labels = batch_of(language.pretraining_batch(16, rng))
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model, batch_of(language.requests(language.MISCHIEF, rng, 12, 4)[:16])


def with_adapter(model: nn.Module) -> nn.Module:
    """The model with a LoRA adapter on all linear layers, B being random too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def to_precision(model: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Casts what is trained, in place, and returns it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(dtype)
        p.grad = None
    return trained


def gradients(model: nn.Module, batch: Batch, autocast: bool) -> list[Tensor]:
    """∇h of what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", BF16) if autocast else nullcontext():
        loss = model(input_ids=batch.ids, labels=batch.labels).loss
    return list(torch.autograd.grad(loss, trained))


@torch.no_grad()
def perturb(
    trained: Sequence[nn.Parameter], grads: Sequence[Tensor], alpha: float, way: Way
) -> None:
    """Moves the model's weights to w′ and rounds them as they are held."""
    live = [p.data for p in trained]
    rounded = [g.to(p.dtype) for g, p in zip(grads, live, strict=True)]
    lengths = torch.stack(norms(rounded))
    if way.rounding == "stochastic":
        dice = torch.Generator().manual_seed(0)
        scale = alpha / (torch.linalg.vector_norm(lengths) + EPS)
        for p, g in zip(live, rounded, strict=True):
            p.copy_(stochastic(p.double() - g.double() * scale, p.dtype, dice))
        return
    w = [p.clone() for p in live]
    perturb_(live, w, rounded, step_sizes(lengths, [alpha] * len(live), "global", EPS))


def difference(model: nn.Module, batch: Batch, alpha: float, way: Way) -> Tensor:
    """∇h(w) − ∇h(w′) as one vector in float64."""
    trained = to_precision(model, way.held)
    at_w = gradients_in(model, batch, way.first, way.autocast)
    to_precision(model, way.second)
    perturb(trained, at_w, alpha, way)
    at_w_prime = gradients_in(model, batch, way.second, way.autocast)
    pairs = zip(at_w, at_w_prime, strict=True)
    return torch.cat([(a.double() - b.double()).flatten() for a, b in pairs])


def gradients_in(
    model: nn.Module, batch: Batch, dtype: torch.dtype, autocast: bool
) -> list[Tensor]:
    """∇h of weights of one dtype."""
    to_precision(model, dtype)
    return gradients(model, batch, autocast)


def regulariser(
    width: int,
    seed: int,
    alphas: Sequence[float] = (0.001, 0.01, 0.1),
    ways: Sequence[str] = tuple(WAYS),
    advance: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Compares ∇h(w) − ∇h(w′) of every way and α with float64, from the weights that way holds.

    Args:
        width: Of the Llama.
        seed: Of its weights and data.
        alphas: Lengths of the step.
        ways: Keys of ``WAYS``.
        advance: Called with 1 after each row.

    Returns:
        One row for each way and α: N, the cosine, and the length of the difference as a multiple
        of float64's.
    """
    plain, batch = language_model(width, seed)
    torch.manual_seed(seed)
    adapted = with_adapter(copy.deepcopy(plain).to(BF16))
    exact: dict[tuple[Any, ...], Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, alpha in product(ways, alphas):
        way = WAYS[name]
        model = copy.deepcopy(adapted if way.adapter else plain)
        trained = to_precision(model, way.held)
        key = (way.held, way.adapter, alpha)
        if key not in exact:
            twin = copy.deepcopy(model).to(F64)
            exact[key] = difference(twin, batch, alpha, Way(F64, F64, F64))
        expected = exact[key]
        got = difference(model, batch, alpha, way)
        rows.append(
            {
                "width": width,
                "seed": seed,
                "size": sum(p.numel() for p in trained),
                "way": name,
                "alpha": alpha,
                "cosine": float(torch.cosine_similarity(got, expected, dim=0)),
                "length": float(got.norm() / expected.norm()),
            }
        )
        advance(1)
    return rows


# --------------------------------------------------------------------------------- presentation


def chosen(rows: Sequence[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """Rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def tables(arrived: list[dict[str, Any]], regularised: list[dict[str, Any]]) -> list[Table]:
    """Both studies, one line for each setting."""
    first = Table(title="The step that arrives")
    for head in ("dtype", "rounding", "gradients", "α", "N", "moved", "length / α", "cosine"):
        first.add_column(head, justify="right" if head in ("α", "N") else "left")
    for row in arrived:
        first.add_row(
            *(row["dtype"], row["rounding"], row["gradients"], f"{row['alpha']:g}"),
            *(f"{row['size']:.0e}", f"{row['moved']:.1%}"),
            *(f"{row['length']:.4f}", f"{row['cosine']:.4f}"),
        )
    second = Table(title="∇h(w) − ∇h(w′) beside float64's, lowest cosine, mean length")
    for head in ("way", "α", "width", "N", "cosine", "length"):
        second.add_column(head, justify="left" if head == "way" else "right")
    keys = dict.fromkeys((r["way"], r["alpha"], r["width"], r["size"]) for r in regularised)
    for way, alpha, width, size in keys:
        seeds = chosen(regularised, way=way, alpha=alpha, width=width)
        second.add_row(
            *(way, f"{alpha:g}", str(width), f"{size:.1e}"),
            f"{min(row['cosine'] for row in seeds):.4f}",
            f"{mean(row['length'] for row in seeds):.3f}",
        )
    return [first, second]


COLOURS = ("#d55e00", "#0072b2", "#009e73")  # told apart by colour-blind readers too
MORE_COLOURS = (*COLOURS, "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255", "#999933", "#888")


def plot(arrived: list[dict[str, Any]], regularised: list[dict[str, Any]], target: Path) -> None:
    """Draws the arrival in bfloat16 over N above, the regulariser over α/√N below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    (above, below) = figure.subplots(2, 3)
    kinds = [
        ("-", "", {"rounding": "nearest", "gradients": "normal"}),
        ("--", ", log-normal", {"rounding": "nearest", "gradients": "log-normal"}),
        (":", ", stochastic", {"rounding": "stochastic", "gradients": "normal"}),
    ]
    labels = {"moved": "share of weights moved", "length": "length / α", "cosine": "cosine"}
    for axis, (quantity, label) in zip(above, labels.items(), strict=True):
        for (colour, alpha), (line, suffix, values) in product(
            zip(COLOURS, ALPHAS, strict=True), kinds
        ):
            rows = chosen(arrived, dtype="bfloat16", alpha=alpha, **values)
            axis.plot(
                [row["size"] for row in rows],
                [row[quantity] for row in rows],
                line,
                color=colour,
                label=f"α = {alpha:g}{suffix}",
            )
        axis.set(xscale="log", xlabel="N", title=f"bfloat16 weights: {label}")
    above[1].set_yscale("log")

    for axis, quantity in zip(below[:2], ("cosine", "length"), strict=True):
        for colour, way in zip(MORE_COLOURS, WAYS, strict=True):
            rows = chosen(regularised, way=way)
            axis.plot(
                [row["alpha"] / row["size"] ** 0.5 for row in rows],
                [row[quantity] for row in rows],
                "o",
                color=colour,
                markersize=4,
                alpha=0.7,
                label=way,
            )
        axis.set(xscale="log", xlabel="α / √N", title=f"∇h(w) − ∇h(w′) beside float64: {quantity}")
    below[1].set_yscale("log")
    handles, names = below[0].get_legend_handles_labels()
    points = below[2].legend(
        handles, names, frameon=False, loc="lower left", fontsize=8, title="below", alignment="left"
    )
    below[2].add_artist(points)
    handles, names = above[0].get_legend_handles_labels()
    below[2].legend(
        handles,
        names,
        frameon=False,
        loc="upper left",
        ncols=2,
        fontsize=9,
        title="above",
        alignment="left",
    )
    below[2].set_axis_off()
    for axis in (*above, *below[:2]):
        axis.grid(alpha=0.3, linewidth=0.5)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--largest", type=float, default=1e8, help="N, from 1e4 in decades")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the Llamas")
    parser.add_argument("--seed", type=int, default=0, help="of the arrival study")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    parser.add_argument(
        "--output", type=Path, default=Path("rounding.json"), help="JSON; a PNG goes beside it"
    )
    args = parser.parse_args(argv)
    if args.largest < 1e4 or min(args.widths) < 8 or any(width % 8 for width in args.widths):
        parser.error("--largest must be at least 1e4 and --widths multiples of 8")
    torch.set_num_threads(args.threads)
    _quieten()
    sizes = [10**k for k in range(4, int(math.log10(args.largest)) + 1)]
    cases = list(product(args.widths, args.seeds))

    console = Console()
    arrived: list[dict[str, Any]] = []
    regularised: list[dict[str, Any]] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("weights", total=sum(sizes) * len(GRADIENTS))
            for size, kind in product(sizes, GRADIENTS):
                arrived += arrival(size, kind, args.seed, lambda n: progress.advance(bar, n))
            bar = progress.add_task("Llamas", total=len(cases) * 3 * len(WAYS))
            for width, seed in cases:
                advance = lambda n, bar=bar: progress.advance(bar, n)  # noqa: E731
                regularised += regulariser(width, seed, advance=advance)
    except KeyboardInterrupt:
        console.print("Interrupted: nothing is written, since a part of a comparison is none.")
        return 130
    record = {
        "command": " ".join(["python", "benchmarks/rounding.py", *_reproducing(argv)]),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch_booster", "transformers", "peft")},
        "arrival": arrived,
        "regulariser": regularised,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    plot(arrived, regularised, args.output.with_suffix(".png"))
    console.print(*tables(arrived, regularised))
    return 0


def _reproducing(argv: list[str] | None) -> list[str]:
    """The command line without the folders of this machine."""
    given = sys.argv[1:] if argv is None else argv
    words = [part for word in given for part in word.split("=", 1)]
    places = {i for i, word in enumerate(words) if word == "--output"}
    return [word for i, word in enumerate(words) if i not in places and i - 1 not in places]


def _quieten() -> None:
    from benchmarks.harmful_finetuning.runs import quieten_libraries

    quieten_libraries()


if __name__ == "__main__":
    sys.exit(main())
