"""How far the steps that go by the name of Booster are from the paper's formula, on one problem.

    g = ∇f(w) + λ·(∇h(w) − ∇h(w − α·∇h(w)/(‖∇h(w)‖ + ε)))

The step of this package runs as it is. Those of three other codebases are written here anew from
what their code does in late 2026; no line of theirs was taken, and none of their code is run. The
formula is computed by itself, on a copy of the model in float64. Everything is float64 unless the
case says bf16, so that what a case shows is the procedure and not the rounding.

    python benchmarks/comparison.py
    python benchmarks/comparison.py --seeds 2 --steps 10 --output build/comparison.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from torch_booster import BoosterOptimizer

LAM, ALPHA, EPS, CLIP, MICRO_BATCHES = 5.0, 0.1, 1e-7, 1.0, 4
WIDTH, CLASSES, BATCH, LR = 16, 4, 8, 1e-3
Loss = Callable[[nn.Module], Tensor]
Grads = list[Tensor | None]

# λ and α under the name of Booster, and who says so.
SETTINGS = {
    (5.0, 0.1): "the paper, the authors' scripts, TamperBench, torch_booster's defaults",
    (0.001, 0.1): "the authors' command line where no script sets λ",
    (25.0, 0.1): "the authors on GSM8K, in an answer to a question",
    (20.0, 0.5): "the upper end of TamperBench's sweep",
    (5.0, 0.01): "SafeTune's runner",
    (100.0, 0.01): "Panacea's comparison",
    (1.0, 0.001): "VAA's comparison",
}


class Classifier(nn.Module):
    """Two layers with dropout between, and a head that the alignment loss alone reaches."""

    def __init__(self, dropout: float, aside: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(2 * WIDTH, CLASSES)
        self.aside = nn.Linear(WIDTH, CLASSES) if aside else None

    def forward(self, x: Tensor, harmful: bool) -> Tensor:
        """The scores of the classes."""
        scores = self.outer(self.dropout(torch.tanh(self.inner(x))))
        return scores if harmful or self.aside is None else scores + self.aside(x)


def batch_of(seed: int, harmful: bool, masks: int | None = None) -> Loss:
    """The loss of one batch as a function of the model.

    Args:
        seed: Of inputs and labels.
        harmful: Which of two labellings of the inputs.
        masks: Seed of the dropout masks; None leaves them to the global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    y = x[:, CLASSES : 2 * CLASSES].argmax(-1) if harmful else x[:, :CLASSES].argmax(-1)

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        if masks is None:
            return nn.functional.cross_entropy(model(x.to(dtype), harmful), y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(masks)
            return nn.functional.cross_entropy(model(x.to(dtype), harmful), y)

    return loss


def grads_of(loss: Loss, model: nn.Module) -> Grads:
    """By torch.autograd.grad, which leaves `.grad` alone."""
    return list(torch.autograd.grad(loss(model), list(model.parameters()), allow_unused=True))


def formula(
    model: nn.Module, f: Sequence[Loss], h: Loss, lam: float, alpha: float, clip: float | None
) -> list[Tensor]:
    """The formula's gradient in float64, the masks of both harmful passes being the same.

    Clipped, where that is asked for, as `torch.nn.utils.clip_grad_norm_` defines it.
    """
    exact = copy.deepcopy(model).double()
    params = list(exact.parameters())

    def whole(grads: Grads) -> list[Tensor]:
        pairs = zip(grads, params, strict=True)
        return [torch.zeros_like(p) if g is None else g.detach() for g, p in pairs]

    state = torch.get_rng_state()
    g_h = whole(grads_of(h, exact))
    length = flat(g_h).norm() + EPS
    with torch.no_grad():
        for p, g in zip(params, g_h, strict=True):
            p.copy_(p - alpha * g / length)
    torch.set_rng_state(state)
    g_h_after = whole(grads_of(h, exact))
    exact.load_state_dict(copy.deepcopy(model).double().state_dict())
    parts = [whole(grads_of(loss, exact)) for loss in f]
    g_f = [torch.stack(each).mean(0) for each in zip(*parts, strict=True)]
    found = [a + lam * (b - c) for a, b, c in zip(g_f, g_h, g_h_after, strict=True)]
    scale = 1.0 if clip is None else min(1.0, clip / (float(flat(found).norm()) + 1e-6))
    return [g * scale for g in found]


# --------------------------------------------------------------------------- the four of them


class Way:
    """One codebase's step: `backward` leaves in `.grad` what `optimizer.step()` then takes.

    Args:
        model: In the mode in which a toolkit gets it, that of evaluation.
        base: The optimizer around which or beside which it works.
        lam: λ.
        alpha: α.
    """

    clips = True  # the combined gradient, at 1, as it is shipped
    accumulates = True

    def __init__(
        self, model: nn.Module, base: torch.optim.Optimizer, lam: float, alpha: float
    ) -> None:
        self.model = model
        self.optimizer = base
        self.lam = lam
        self.alpha = alpha
        model.train()

    def backward(self, f: Sequence[Loss], h: Loss) -> None:
        """Runs the passes of one optimizer step.

        Args:
            f: The alignment losses of its micro-batches.
            h: The harmful loss.
        """
        raise NotImplementedError

    def params(self) -> list[nn.Parameter]:
        """The trained weights."""
        return list(self.model.parameters())


class TorchBooster(Way):
    """This package, in stages."""

    def __init__(
        self, model: nn.Module, base: torch.optim.Optimizer, lam: float, alpha: float
    ) -> None:
        super().__init__(model, base, lam, alpha)
        self.optimizer = self.booster = BoosterOptimizer(base, lam, alpha)

    def backward(self, f: Sequence[Loss], h: Loss) -> None:
        """`regularize`, and then the micro-batches."""

        def closure() -> Tensor:
            loss = h(self.model)
            loss.backward()
            return loss

        self.optimizer.zero_grad()
        self.booster.regularize(closure)
        for loss in f:
            (loss(self.model) / len(f)).backward()


class Authors(Way):
    """git-disl/Booster: everything within the training step of a micro-batch.

    What `.grad` holds from earlier micro-batches is in ∇h(w) when it is read, and is then cleared.
    Every loss is divided by their number. The move is subtracted and added again.
    """

    def backward(self, f: Sequence[Loss], h: Loss) -> None:
        """One training step after another, on one gradient."""
        self.optimizer.zero_grad()
        for loss in f:
            self.training_step(loss, h, len(f))

    def training_step(self, f: Loss, h: Loss, divisor: int) -> None:
        """Two harmful passes and one of alignment."""
        (h(self.model) / divisor).backward()
        first = self.taken()
        length = torch.stack([g.norm() for g in first.values()]).norm() + EPS
        self.move(first, -self.alpha, length)
        (h(self.model) / divisor).backward()
        second = self.taken()
        self.move(first, self.alpha, length)
        (f(self.model) / divisor).backward()
        self.combine(first, second)

    def taken(self) -> dict[nn.Parameter, Tensor]:
        """Copies of the gradients, which are cleared."""
        found = {p: self.gradient(p).clone() for p in self.params()}
        self.model.zero_grad()
        return found

    @staticmethod
    def gradient(param: nn.Parameter) -> Tensor:
        """What is in `.grad`, which must be something."""
        if param.grad is None:
            raise AttributeError("a pass does not reach this parameter")
        return param.grad

    def move(self, grads: dict[nn.Parameter, Tensor], by: float, length: Tensor | float) -> None:
        """Moves the weights along a gradient."""
        with torch.no_grad():
            for p, g in grads.items():
                p.add_(by * g / length)

    def combine(
        self, first: dict[nn.Parameter, Tensor], second: dict[nn.Parameter, Tensor]
    ) -> None:
        """Adds the regulariser to the gradient."""
        for p in self.params():
            p.grad = self.gradient(p) + self.lam * first[p] - self.lam * second[p]


class TamperBench(Authors):
    """The authors' step with gradients that may be missing, and without clipping.

    Under the versions of transformers that it asks for, nothing divides a loss.
    """

    clips = False

    def training_step(self, f: Loss, h: Loss, divisor: int) -> None:
        """As the authors', undivided."""
        super().training_step(f, h, 1)

    def taken(self) -> dict[nn.Parameter, Tensor]:
        """Of the parameters that the pass reached."""
        found = {p: p.grad.clone() for p in self.params() if p.grad is not None}
        self.model.zero_grad()
        return found

    def combine(
        self, first: dict[nn.Parameter, Tensor], second: dict[nn.Parameter, Tensor]
    ) -> None:
        """Where either gradient is missing, the other stands alone."""
        for p in first.keys() & second.keys():
            regulariser = self.lam * (first[p] - second[p])
            p.grad = regulariser if p.grad is None else p.grad + regulariser


class SafeTune(Way):
    """The runner of Lexsi-Labs' toolkit: one ∇h for all steps, taken where the weights begin.

    It is taken before the model is put in training mode, on a few harmful examples that stay the
    same. The move is taken back also where a pass raises.
    """

    clips = False
    accumulates = False

    def __init__(
        self, model: nn.Module, base: torch.optim.Optimizer, lam: float, alpha: float
    ) -> None:
        model.eval()
        self.first: Grads | None = None
        super().__init__(model, base, lam, alpha)

    def backward(self, f: Sequence[Loss], h: Loss) -> None:
        """A pass of h at w′ and one of f at w."""
        if self.first is None:
            self.model.eval()
            self.first, self.harmful = grads_of(h, self.model), h
            self.model.train()
        present = [g for g in self.first if g is not None]
        length = torch.stack([g.norm() for g in present]).norm() + EPS
        moves = [None if g is None else self.alpha * g / length for g in self.first]
        self.move(moves, -1.0)
        try:
            second = grads_of(self.harmful, self.model)
        finally:
            self.move(moves, 1.0)
        (loss,) = f
        self.optimizer.zero_grad()
        loss(self.model).backward()
        for p, a, b in zip(self.params(), self.first, second, strict=True):
            if p.grad is not None and a is not None and b is not None:
                combined = p.grad.float() if p.dtype is torch.bfloat16 else p.grad
                p.grad = (combined + self.lam * a - self.lam * b).to(p.dtype)

    def move(self, moves: Grads, by: float) -> None:
        """Moves the weights."""
        with torch.no_grad():
            for p, move in zip(self.params(), moves, strict=True):
                if move is not None:
                    p.add_(move, alpha=by)


WAYS: dict[str, type[Way]] = {
    "torch_booster": TorchBooster,
    "git-disl/Booster": Authors,
    "TamperBench": TamperBench,
    "SafeTune": SafeTune,
}


# --------------------------------------------------------------------------------- what is tried


@dataclass(frozen=True)
class Case:
    """One thing that a training run may ask of a step, and what is then measured."""

    micro_batches: int = 1
    clip: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    steps: int = 1
    raises: bool = False
    aside: bool = False
    lr: float = LR
    scale: float = 1.0  # of the weights, so that clipping has something to clip


PLAIN = "plain"
AFTER = "after 100 steps"
RESTORED = "bf16, put back 100 times"
CASES = {
    PLAIN: Case(),
    "accumulation over 4": Case(micro_batches=MICRO_BATCHES),
    "clipping at 1 asked for": Case(clip=True, scale=3.0),
    "dropout 0.1": Case(dropout=0.1),
    "weights in bf16": Case(dtype=torch.bfloat16),
    "a layer that h does not reach": Case(aside=True),
    AFTER: Case(steps=100),
    RESTORED: Case(steps=100, dtype=torch.bfloat16, lr=0.0),
    "an exception at w′": Case(raises=True),
}


class BrokenError(Exception):
    """What a pass raises."""


def measure(
    way: str, case: Case, seed: int, lam: float = LAM, alpha: float = ALPHA
) -> float | str | None:
    """How far one way is from the formula in one case.

    Returns:
        Of one step, ‖g − formula‖ / ‖formula‖. Of many, the distance of the weights at the end
        over what the formula's run moved them, or, where the learning rate is zero, over their
        norm. Of an exception, how far it left the weights, in units of α. Text where the way fails,
        None where it does not offer what the case asks.
    """
    if case.micro_batches > 1 and not WAYS[way].accumulates:
        return None
    model = model_of(case, seed)
    clip = CLIP if case.clip else None
    torch.manual_seed(seed)
    first = formula(model.train(), *losses(seed, 0, case), lam, alpha, clip)
    step = WAYS[way](model, torch.optim.AdamW(model.parameters(), lr=case.lr), lam, alpha)
    start = flat(model.parameters())
    with warnings.catch_warnings():
        # The package warns of a harmful loss that falls little, and of what bf16 rounds away.
        warnings.simplefilter("ignore")
        for t in range(case.steps):
            f, h = losses(seed, t, case)
            if case.raises:
                return thrown(step, f, h, start, alpha)
            torch.manual_seed(seed)
            try:
                step.backward(f, h)
            except AttributeError as error:
                return f"error: {error}"
            if clip is not None and step.clips:
                nn.utils.clip_grad_norm_(step.params(), clip)
            if case.steps > 1:
                step.optimizer.step()
    if case.steps == 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in step.params()]
        return float((flat(grads) - flat(first)).norm() / flat(first).norm())
    end, right = flat(model.parameters()), formulas_end(case, seed, lam, alpha)
    return float((end - right).norm() / (right - start if case.lr else start).norm())


def model_of(case: Case, seed: int) -> Classifier:
    """The model with its first weights."""
    torch.manual_seed(seed)
    model = Classifier(case.dropout, case.aside)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(case.scale)
    return model.to(case.dtype)


@cache
def formulas_end(case: Case, seed: int, lam: float, alpha: float) -> Tensor:
    """The weights to which the formula's own run comes, in float64."""
    exact = model_of(case, seed).double()
    if not case.lr:
        return flat(exact.parameters())
    oracle = torch.optim.AdamW(exact.parameters(), lr=case.lr)
    for t in range(case.steps):
        wanted = formula(exact, *losses(seed, t, case), lam, alpha, CLIP if case.clip else None)
        for p, g in zip(exact.parameters(), wanted, strict=True):
            p.grad = g
        oracle.step()
    return flat(exact.parameters())


def losses(seed: int, step: int, case: Case) -> tuple[list[Loss], Loss]:
    """The alignment losses of a step's micro-batches and its harmful loss.

    The alignment masks are given, so that a difference is the regulariser's.
    """
    begin = 100_000 * seed + 100 * step
    f = [batch_of(begin + 1 + k, False, masks=seed) for k in range(case.micro_batches)]
    return f, batch_of(begin, True)


def thrown(step: Way, f: Sequence[Loss], h: Loss, start: Tensor, alpha: float) -> float:
    """How far an exception at w′ leaves the weights from where they were, in units of α."""

    def broken(model: nn.Module) -> Tensor:
        if not torch.equal(flat(model.parameters()), start):
            raise BrokenError
        return h(model)

    try:
        step.backward(f, broken)
    except BrokenError:
        return float((flat(step.params()) - start).norm()) / alpha
    raise AssertionError("no pass was run at w′")


def strength(seed: int, lam: float, alpha: float) -> float:
    """‖λ·(∇h(w) − ∇h(w′))‖ / ‖∇f(w)‖ at the start."""
    torch.manual_seed(seed)
    model = Classifier(0.0, False).double()
    f, h = losses(seed, 0, CASES[PLAIN])
    g_f = flat(formula(model, f, h, 0.0, alpha, None))
    g = flat(formula(model, f, h, lam, alpha, None))
    return float((g - g_f).norm() / g_f.norm())


def flat(tensors: Any) -> Tensor:
    """All numbers as one vector in float64."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


# --------------------------------------------------------------------------------- the record


def tasks(steps: int) -> Iterator[tuple[dict[str, Any], Callable[[int], float | str | None]]]:
    """What to measure: the row that describes it, and the measurement as a function of the seed."""
    for name, case in CASES.items():
        asked = replace(case, steps=min(case.steps, steps))
        for way in WAYS:
            row = {"case": name, "way": way, "lam": LAM, "alpha": ALPHA, "steps": asked.steps}
            yield row, lambda seed, way=way, case=asked: measure(way, case, seed)
    many = Case(steps=steps)
    for lam, alpha in SETTINGS:
        row: dict[str, Any] = {"case": "strength", "lam": lam, "alpha": alpha, "steps": 0}
        yield row, lambda seed, lam=lam, alpha=alpha: strength(seed, lam, alpha)
        for way in WAYS:
            row = {"case": "setting", "way": way, "lam": lam, "alpha": alpha, "steps": steps}
            yield row, lambda seed, way=way, s=(lam, alpha): measure(way, many, seed, *s)


def summary(values: Sequence[float | str | None]) -> float | str | None:
    """The median over the seeds, or what all of them say."""
    numbers = [v for v in values if isinstance(v, float)]
    return statistics.median(numbers) if numbers else values[0]


def shown(value: float | str | None) -> str:
    """A cell: rounding as a power of ten, everything else in two digits.

    Example:
        >>> [shown(x) for x in (0.0, 3.2e-16, 0.0123, 4.56, 123.4, None)]
        ['0', '3e-16', '0.012', '4.6', '120', '–']
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return "error"
    if value == 0:
        return "0"
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = f"{value:.2g}"
    return str(int(float(digits))) if "e" in digits else digits


def by_case(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the first table: a case in each row, a way in each column."""
    found = {(r["case"], r.get("way")): r["median"] for r in rows}
    return [[case, *(shown(found[case, way]) for way in WAYS)] for case in CASES]


def by_setting(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the second table: λ, α, the regulariser's size, the ways after many steps."""
    found = {(r["case"], r.get("way"), r["lam"], r["alpha"]): r["median"] for r in rows}
    return [
        [
            f"{lam:g}, {alpha:g}",
            shown(found["strength", None, lam, alpha]),
            *(shown(found["setting", way, lam, alpha]) for way in WAYS),
        ]
        for lam, alpha in SETTINGS
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="of weights, batches and masks")
    parser.add_argument("--steps", type=int, default=100, help="of the runs of many steps")
    parser.add_argument("--output", type=Path, default=Path("comparison.json"), help="JSON")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.steps < 2:
        parser.error("--seeds must be at least 1 and --steps at least 2")

    console = Console()
    rows: list[dict[str, Any]] = []
    todo = list(tasks(args.steps))
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            for row, value_at in progress.track(todo, description="measurements"):
                values = [value_at(seed) for seed in range(args.seeds)]
                rows.append({**row, "median": summary(values), "by_seed": values})
    except KeyboardInterrupt:
        console.print("Interrupted: nothing is written, since a part of a comparison is none.")
        return 130
    record = {
        "command": f"python benchmarks/comparison.py --seeds {args.seeds} --steps {args.steps}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()}
        | {"torch_booster": version("torch_booster")},
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    heads = ("λ, α", "regulariser / ∇f")
    for title, first, cells in (
        (f"Distance from the formula, λ = {LAM:g}, α = {ALPHA:g}", ("case",), by_case(rows)),
        (f"After {args.steps} steps", heads, by_setting(rows)),
    ):
        view = Table(title=title)
        for head in (*first, *WAYS):
            view.add_column(head)
        for line in cells:
            view.add_row(*line)
        console.print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
