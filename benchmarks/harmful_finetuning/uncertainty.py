"""How sure a few seeds make us: bootstrap intervals, paired differences, summaries of a curve.

What a bootstrap over five seeds can say: how far the mean would move if the same experiment were
run with other seeds, as far as these seeds show it. What it cannot say:

- It knows no seed it has not seen. Its interval never leaves the range of the observed values; if a
  fifth of all runs fail and none of these did, the interval does not show it.
- It is too narrow. With five normally distributed values the 95 % percentile interval covers the
  true mean in about 83 % of cases (own simulation, 4,000 draws).
- An interval that excludes zero is weak evidence: five differences of one sign suffice, which has
  probability 2/32 = 0.06 where methods do not differ.
- It covers what the seed decides. Another model, data set, attack or choice of hyperparameters is
  outside it, and no correction is made for the number of comparisons in a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import numpy as np
from scipy.stats import bootstrap  # pyright: ignore[reportMissingTypeStubs]

RESAMPLES = 10_000

Curve = Sequence[tuple[float, float]]  # (step, value), steps ascending


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; no interval from one seed or a non-finite value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below zero; without an interval, whether the mean is."""
        return (self.mean if self.high is None else self.high) < 0


def mean_interval(values: Iterable[float]) -> Estimate | None:
    """The mean with its 95 % percentile bootstrap interval, 10,000 resamples, fixed seed.

    The interval is too narrow for few values, see the module's docstring; where all values are
    equal it has no width, which shows that they are equal and not that the mean is certain.

    Args:
        values: One score a seed.

    Returns:
        The estimate, or None without any value.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    return _mean_interval(tuple(values))


@lru_cache(maxsize=10_000)
def _mean_interval(values: tuple[float, ...]) -> Estimate | None:
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, len(values))
    low, high = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(low), float(high), len(values))


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """The mean of a − b over the seeds that have both, with its bootstrap interval.

    The pairs are resampled, not the two sides: what a seed does to both (its data order, its
    initialisation) cancels. A seed that lacks one side leaves with both, and `n` says how many
    stayed.

    Args:
        a: Score by seed.
        b: Score by seed of the baseline.

    Returns:
        The estimate, or None without a common seed.
    """
    return mean_interval(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def steps_to(curve: Curve, level: float = 50.0) -> float | None:
    """The first step at which the curve reaches a level, linear between its points.

    Args:
        curve: (step, value) pairs, steps ascending.
        level: In the curve's unit (percent for a harmful score).

    Returns:
        The step, or None where the curve never reaches the level: it is censored at its last step.
    """
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value >= level:
            if before is None:
                return float(step)
            share = (level - before[1]) / (value - before[1])
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def area_under(curve: Curve) -> float | None:
    """The area under a curve divided by its length in steps: the score averaged over the attack.

    For a harmful score in percent it lies in [0, 100]; trapezoid rule.

    Args:
        curve: (step, value) pairs, steps ascending.

    Returns:
        The average height, or None with fewer than two points.
    """
    if len(curve) < 2:
        return None
    steps, values = np.asarray(curve, float).T
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
