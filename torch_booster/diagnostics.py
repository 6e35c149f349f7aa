"""What a regulariser saw, and when to be alarmed by it."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Diagnostics", "alarms", "smoothed", "warn_of_passes"]


class Diagnostics(NamedTuple):
    """What one regulariser saw: 0-dimensional, detached tensors on the device.

    Reading one with `.item()` waits for the device; the step does so for a trust region alone. To
    first order the perturbation lowers h by Σᵢ sᵢ‖∇ᵢh(w)‖², which is α·‖∇h(w)‖ with one norm over
    everything.
    """

    harmful_loss: Tensor  # h(w)
    perturbed_harmful_loss: Tensor  # h(w′)
    harmful_loss_drop: Tensor  # h(w) − h(w′), the quantity that is being regularised
    harmful_grad_norm: Tensor  # ‖∇h(w)‖ over all trainable parameters
    perturbation_norm: Tensor  # ‖w′ − w‖, measured in weights narrower than 32 bits, else ≈ α
    drop_ratio: Tensor  # the drop over the one expected to first order; NaN where none is


def smoothed(mean: Tensor | None, ratio: Tensor) -> Tensor:
    """A running mean of `drop_ratio` over some ten steps, from 1 on, on the device.

    Single steps fall below zero in alignments that end well, so that they are cut at −1 and 2.
    """
    ratio = ratio.nan_to_num(nan=1.0).clamp(-1.0, 2.0)
    return (torch.ones_like(ratio) if mean is None else mean).lerp(ratio, 0.1)


def alarms(step: int, ratio: float, h: float, start: float) -> dict[str, str]:
    """What the diagnostics of a step, or their means over some steps, warn of.

    The thresholds are from recorded alignments; docs/choosing.md says how often they err.

    Args:
        step: t, optimizer steps taken before.
        ratio: From `smoothed`.
        h: Harmful loss.
        start: Harmful loss at the run's first regulariser; NaN where the run was resumed or
            the first steps had none.

    Returns:
        A sentence for each kind of trouble.

    Example:
        >>> list(alarms(700, -0.4, 2.3, 1.5))
        ['blow-up']
    """
    found: dict[str, str] = {}
    if ratio < 0:  # whatever the scale of the gradients, as under a GradScaler
        found["blow-up"] = (
            f"At step {step} the alignment blows up: over the last steps a simulated harmful step "
            f"lowered the harmful loss by {ratio:.2g} times what its gradient promises, so that "
            "the regulariser no longer points where it is meant to. Go back to an earlier "
            "checkpoint and pass trust_region=True; where it is on, lower alpha or lam, or raise "
            "lam_delay_steps and lam_warmup_steps."
        )
    if step >= 50 and h <= 1.1 * start:
        found["easy way out"] = (
            f"At step {step} the harmful loss is {h:.3g}, where it was {start:.3g} at the first "
            "step: a model that complies stays one where a harmful step gains nothing, and the "
            "refusals may go no deeper than their first words. Set lam_delay_steps to a quarter "
            "of the alignment and lam_warmup_steps to half of it, or lower lam."
        )
    return found


def warn_of_passes(
    trial: Tensor,
    h: Tensor,
    drop: Tensor,
    rounded: tuple[float, torch.dtype] | None,
    unreached: tuple[int, int] = (0, 0),
) -> None:
    """Warns of harmful passes that do not see one function, or not the perturbation asked for.

    Args:
        trial: h(w) of a first pass.
        h: h(w) of a second one, on the same randomness and buffers.
        drop: h(w) − h(w′).
        rounded: Share of the narrow weights that moved, and their dtype.
        unreached: How many weights in `perturbed` got no gradient, and how many there are.
    """
    first, second, change = trial.item(), h.item(), abs(drop.item())
    gap = abs(first - second)
    if math.isfinite(gap) and gap > 1e-5 * abs(second) + 0.01 * change:
        warnings.warn(
            f"harmful_closure is not one function of the weights: two calls at the same weights "
            f"gave {first:.6g} and {second:.6g}, where the perturbation changes the loss by "
            f"{change:.2g}. The regulariser then measures that difference. Usual "
            "causes: the closure draws a new batch (draw it before, outside the closure), a random "
            "generator of its own (seed it in the closure), or state that a pass leaves in the "
            "model (pass module=model, or put it back in the closure).",
            stacklevel=6,
        )
    if rounded is not None and rounded[0] < 0.9:
        fraction, dtype = rounded
        warnings.warn(
            f"Rounding to {dtype} moved only {fraction:.0%} of the weights that the Booster "
            "perturbation should have moved, so the regulariser sees another perturbation "
            "than the one asked for. Keep the trainable weights (such as LoRA adapters) in "
            "float32, or raise alpha and watch diagnostics.perturbation_norm.",
            stacklevel=6,
        )
    if unreached[0]:
        warnings.warn(
            f"harmful_closure made no gradient of {unreached[0]} of the {unreached[1]} weights in "
            "perturbed, which stay where they are. For experts that a batch leaves out that is as "
            "it should be. Offsets of a MergedOffsets do nothing in a list: pass it alone.",
            stacklevel=6,
        )
