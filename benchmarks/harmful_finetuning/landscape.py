"""How far one harmful step would get: an aligned model along straight lines, before any attack.

    h(w − t·d/‖d‖)  for growing t,

with the gradient g of the harmful loss at w, on samples of the attack, and one of three directions:
d = g, as Booster simulates; dᵢ = gᵢ/‖gᵢ‖ of each weight tensor i; d = sign(g), which is what
AdamW's first step takes. The loss and the harmful score are those of held-out prompts. Beside it,
what share of ‖g‖² lies in the tensors of each kind: it is the share of Booster's simulated step
that they get; and ‖w‖, which a length can be compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks.harmful_finetuning import runs, score
from benchmarks.harmful_finetuning.attack import to_attack
from benchmarks.harmful_finetuning.methods import METHODS
from benchmarks.harmful_finetuning.methods.stage import backpropagate
from benchmarks.harmful_finetuning.models import Tell, load_tokenizer
from benchmarks.harmful_finetuning.runs import Run
from benchmarks.harmful_finetuning.tokens import batches

DISTANCES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
BATCHES = 10
KINDS = {"embed": "embedding", "attn": "attention", "mlp": "feed-forward"}
OTHER = "norms and other"

DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda g: g,
    "norms by tensor": lambda g: g / (torch.linalg.vector_norm(g) + 1e-7),
    "sign": torch.sign,
}


Rows = list[dict[str, Any]]


def measure(wanted: list[Run], cache: Path, tell: Tell) -> tuple[Rows, Rows]:
    """Follows each run's aligned model along each direction; aligns those that are not there.

    Returns:
        Rows of the tables `lines` and `gradients`.
    """
    lines: Rows = []
    gradients: Rows = []
    for done, run in enumerate(wanted, 1):
        runs.make_base(run, cache, tell)
        runs.make_aligned(run, cache, tell)
        of = {"trained": run.settings.trained, "method": run.method, "seed": run.seed}
        along, gradient = _along_the_lines(run, cache)
        lines += [of | row for row in along]
        gradients.append(of | gradient)
        tell("landscape", done, len(wanted))
    return lines, gradients


def _along_the_lines(run: Run, cache: Path) -> tuple[Rows, dict[str, float]]:
    settings, samples = run.settings, runs.samples_of(run.settings)
    base, aligned = runs.base_folder(run, cache), runs.aligned_folder(run, cache)
    torch.manual_seed(run.seed)  # a second adapter is random
    model = to_attack(settings, base, aligned, METHODS[run.method].one_adapter)
    tokenizer = load_tokenizer(base, settings)
    harmful = batches(samples.attack, tokenizer, settings, run.seed)
    model.train()
    for batch in islice(harmful, BATCHES):
        backpropagate(model, batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = list(named.values())
    start = [p.detach().clone() for p in weights]
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad / BATCHES for p in weights]

    def at(distance: float, line: list[Tensor]) -> dict[str, float]:
        with torch.no_grad():
            for p, w, d in zip(weights, start, line, strict=True):
                p.copy_(w - distance * d)
        found = score.evaluate(model, tokenizer, settings, samples, during=True)
        return {"distance": distance, **found.scores}

    lines = displacements(gradient)
    origin = at(0.0, lines["gradient"])
    rows = [
        {"direction": name} | point
        for name, line in lines.items()
        for point in (origin, *(at(distance, line) for distance in DISTANCES))
    ]
    norms = {
        "weight_norm": get_total_norm(start).item(),
        "harmful_grad_norm": get_total_norm(gradient).item(),
    }
    return rows, norms | shares(dict(zip(named, gradient, strict=True)))


def shares(gradient: dict[str, Tensor]) -> dict[str, float]:
    """The share of the squared norm in each kind of tensor, by the names transformers gives."""
    found = dict.fromkeys((*KINDS.values(), OTHER), 0.0)
    for name, g in gradient.items():
        kind = next((kind for part, kind in KINDS.items() if part in name), OTHER)
        found[kind] += g.double().square().sum().item()
    total = sum(found.values()) or 1.0
    return {kind: square / total for kind, square in found.items()}


def displacements(gradient: list[Tensor]) -> dict[str, list[Tensor]]:
    """Each direction over all tensors, of length 1 together."""
    found: dict[str, list[Tensor]] = {}
    for name, of_tensor in DIRECTIONS.items():
        line = [of_tensor(g) for g in gradient]
        norm = get_total_norm(line)
        found[name] = [d / (norm + 1e-7) for d in line]
    return found
