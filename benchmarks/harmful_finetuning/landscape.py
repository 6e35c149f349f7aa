"""How far one harmful step would get: an aligned model along straight lines, before any attack.

    h(w − t·d/‖d‖)  for growing t,

with the gradient g of the harmful loss at w, on samples of the attack, and one of three directions:
d = g, as Booster simulates; dᵢ = gᵢ/‖gᵢ‖ of each weight tensor i; d = sign(g), which is what
AdamW's first step takes. The loss and the harmful score are those of held-out prompts. Beside it,
what share of ‖g‖² lies in the tensors of each kind: it is the share of Booster's simulated step
that they get; and ‖w‖, which a length can be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks.harmful_finetuning import grid, metrics, training
from benchmarks.harmful_finetuning.grid import Cell
from benchmarks.harmful_finetuning.methods import backpropagate
from lora_alignment import Report, load_tokenizer

__all__ = ["DIRECTIONS", "DISTANCES", "displacements", "measure", "shares"]

DISTANCES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
BATCHES = 10
KINDS = {"embed": "embedding", "attn": "attention", "mlp": "feed-forward"}
OTHER = "norms and other"

DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda g: g,
    "norms by tensor": lambda g: g / (torch.linalg.vector_norm(g) + 1e-7),
    "sign": torch.sign,
}


def measure(cells: Iterable[Cell], cache: Path, report: Report) -> list[dict[str, Any]]:
    """Follows each cell's aligned model along each direction; aligns those that are not there."""
    results: list[dict[str, Any]] = []
    cells = list(cells)
    for done, cell in enumerate(cells, 1):
        grid.pretrain(cell, cache, report)
        grid.align(cell, cache, report)
        results += _along_the_lines(cell, cache)
        report("landscape", done, len(cells))
    return results


def _along_the_lines(cell: Cell, cache: Path) -> list[dict[str, Any]]:
    settings = cell.settings
    samples = grid.samples_of(settings)
    base, aligned = grid.base_folder(cell, cache), grid.aligned_folder(cell, cache)
    torch.manual_seed(cell.seed)  # a second adapter is random
    model = training.to_fine_tune(settings, base, aligned, cell.method)
    tokenizer = load_tokenizer(base, settings)
    harmful = training.stream(samples.attack, tokenizer, settings, cell.seed)
    model.train()
    for batch in islice(harmful, BATCHES):
        backpropagate(model, batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = list(named.values())
    start = [p.detach().clone() for p in weights]
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad / BATCHES for p in weights]
    about = {
        "weight_norm": get_total_norm(start).item(),
        "harmful_grad_norm": get_total_norm(gradient).item(),
        "harmful_grad_shares": shares(dict(zip(named, gradient, strict=True))),
    }

    def at(distance: float, line: list[Tensor]) -> dict[str, float]:
        with torch.no_grad():
            for p, w, d in zip(weights, start, line, strict=True):
                p.copy_(w - distance * d)
        scores = metrics.evaluate(model, tokenizer, settings, samples, during=True)
        return {"distance": distance, **scores}

    described = grid.described(cell) | about
    lines = displacements(gradient)
    origin = at(0.0, lines["gradient"])
    return [
        described
        | {
            "vary": cell.vary | {"direction": name},
            "line": [origin, *(at(distance, line) for distance in DISTANCES)],
        }
        for name, line in lines.items()
    ]


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
