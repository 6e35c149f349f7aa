"""λ, α and the schedule of a run, and what its regularisers have seen.

They live in the param groups of the optimizer that steps, so that a checkpoint has them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_booster.checks import (
    checked,
    checked_count,
    checked_flag,
    checked_norm,
    checked_share,
)
from torch_booster.closure import Waiting
from torch_booster.diagnostics import Diagnostics, alarms, smoothed
from torch_booster.distributed import averaged
from torch_booster.functional import LEAST_TRUSTED, lam_at, trusted

__all__ = ["ALPHA", "LAM", "REGION", "STEP", "Hyperparameters", "Now"]

# Keys in the param groups. The base's own names stay free: RMSprop and ASGD own `alpha`.
LAM = "booster_lam"
ALPHA = "booster_alpha"
STEP = "booster_step"
REGION = "booster_trust_region"  # the fraction of α in force


@dataclass
class Now:
    """What may change between steps, in one object that stand-ins of the optimizer share."""

    waiting: Waiting | None = None  # the regulariser that is in .grad and has not been stepped on
    diagnostics: Diagnostics | None = None
    start: Tensor | None = None  # harmful loss of the regulariser at the run's first steps
    ratio: Tensor | None = None  # running mean of drop_ratio, of which outliers are cut
    checked: bool = False
    prepared: bool = False  # by Accelerate
    told: set[str] = field(default_factory=set[str])  # warnings that have been given
    norm: str = "global"
    every: int = 1
    lam_warmup_steps: int = 0
    lam_delay_steps: int = 0
    trust_region: bool = False


def _in_groups(name: str, key: str, doc: str) -> Any:
    """A hyperparameter that every group has, readable where they agree."""

    def get(self: Hyperparameters) -> float:
        values = [group[key] for group in self._groups()]
        if len(set(values)) > 1:
            raise ValueError(
                f"The param groups have different {name}: {values}. "
                f"Read opt.param_groups[i][{key!r}] instead."
            )
        return values[0]

    def put(self: Hyperparameters, value: float) -> None:
        self._defaults[key] = checked(name, value)
        for group in self.param_groups:
            group[key] = self._defaults[key]

    return property(get, put, doc=doc)


_FROM_ZERO, _ABOVE_ZERO = (partial(checked_count, least=least) for least in (0, 1))


def _shared(name: str, check: Callable[[str, Any], Any], doc: str) -> Any:
    """An attribute that may change between steps, set through a stand-in as well."""

    def get(self: Hyperparameters) -> Any:
        return getattr(self._now, name)

    def put(self: Hyperparameters, value: Any) -> None:
        setattr(self._now, name, check(name, value))

    return property(get, put, doc=doc)


class Hyperparameters:
    """What a Booster step is told, for a class that has `param_groups`, `_now` and `_stepping`."""

    param_groups: Any
    _now: Now
    _stepping: Any = None  # the optimizer that really steps, where it says of itself `maximize`

    def _set(
        self,
        lam: float,
        alpha: float,
        norm: str,
        lam_warmup_steps: int,
        lam_delay_steps: int,
        every: int,
        eps: float,
        trust_region: bool,
    ) -> None:
        self._defaults = {LAM: checked("lam", lam), ALPHA: checked("alpha", alpha)}
        self.norm = norm
        self.lam_warmup_steps = lam_warmup_steps
        self.lam_delay_steps = lam_delay_steps
        self.every = every
        self.eps = checked("eps", eps)
        self.trust_region = trust_region

    lam: float = _in_groups("lam", LAM, "λ, regulariser intensity. Setting it sets every group.")
    alpha: float = _in_groups("alpha", ALPHA, "α, length of the simulated step; as `lam`.")

    norm: Any = _shared("norm", checked_norm, 'One norm ("global"), or one a tensor ("tensor").')
    every: int = _shared("every", _ABOVE_ZERO, "k: the regulariser comes at every k-th step.")
    lam_warmup_steps: int = _shared(
        "lam_warmup_steps", _FROM_ZERO, "Steps over which λ grows from zero."
    )
    lam_delay_steps: int = _shared(
        "lam_delay_steps", _FROM_ZERO, "Steps before that, in which λ is 0."
    )
    trust_region: bool = _shared(
        "trust_region", checked_flag, "Shorten α where the harmful loss does not fall as promised."
    )

    @property
    def step_count(self) -> int:
        """t, optimizer steps taken, those before a resumption included."""
        return max(group[STEP] for group in self._groups())

    def is_due(self) -> bool:
        """Whether the step to come has a regulariser: λ is not zero in some group by then."""
        groups = self._groups()
        for group in groups:
            for key in self._defaults:
                checked(key, group[key])
            if self.trust_region:
                checked_share(REGION, group[REGION])
        return any(self._lam(group) for group in groups)

    def _lam(self, group: dict[str, Any], step: int | None = None) -> float:
        """λ in force at a step, the coming one, in the sign in which the base takes gradients."""
        ascends = group.get("maximize", getattr(self._stepping, "maximize", False))
        schedule = self.lam_warmup_steps, self.lam_delay_steps, self.every
        lam = lam_at(group[STEP] if step is None else step, group[LAM], *schedule)
        return -lam if ascends else lam

    def _alpha(self, group: dict[str, Any]) -> float:
        """α in force."""
        return group[ALPHA] * group[REGION] if self.trust_region else group[ALPHA]

    def _own_alpha(self) -> float:
        """α of weights that are in no group: the groups', or where these differ the optimizer's."""
        first, *others = self._groups()
        same = all(group[ALPHA] == first[ALPHA] for group in others)
        return self._alpha(first if same else first | {ALPHA: self._defaults[ALPHA]})

    def _adapt_alpha(self, loss_scale: float = 1.0, alone: bool = True) -> None:
        """Lets α follow what the passes saw; waits for the device and, unless alone, all ranks.

        Args:
            loss_scale: By which the gradients are larger than those of the loss.
            alone: This rank has seen what the others have.
        """
        seen = self._now.diagnostics
        if not self.trust_region or seen is None:
            return
        there = seen.harmful_loss.isfinite() & seen.harmful_grad_norm.isfinite()
        lost = there & ~seen.perturbed_harmful_loss.isfinite()  # NaN is no better than ∞
        ratio = torch.where(lost, -torch.inf, seen.drop_ratio * loss_scale)
        if not alone:
            averaged([ratio], [ratio])  # in place
        number = ratio.item()
        for group in self._groups():
            group[REGION] = trusted(group[REGION], number)
        if self.param_groups[0][REGION] == LEAST_TRUSTED:
            self._tell(
                "short",
                "The trust region has shortened alpha to a thousandth, and the harmful loss still "
                "falls by less than a quarter of what its gradient promises. Usual causes: a "
                "closure whose gradients are scaled and whose loss is not (under a GradScaler call "
                "regularize(closure, loss_scale=scaler.get_scale())), a loss in 16 bits, or passes "
                "that are not one function of the weights. Otherwise lower lam.",
            )

    def _groups(self) -> list[dict[str, Any]]:
        """The param groups, completed where the base has got new ones."""
        groups = self.param_groups
        values = self._defaults | {STEP: max((g.get(STEP, 0) for g in groups), default=0)}
        if self.trust_region:
            values[REGION] = min((g.get(REGION, 1.0) for g in groups), default=1.0)
        for group in groups:
            for key, value in values.items():
                group.setdefault(key, value)
        return groups

    # ------------------------------------------------------------------ what was seen

    @property
    def diagnostics(self) -> Diagnostics | None:
        """What the regulariser of this step saw; None where the last step had none."""
        return self._now.diagnostics

    def read_diagnostics(self) -> dict[str, float]:
        """The diagnostics as numbers; waits for the device.

        Warns once where the alignment blows up or takes the easy way out, with the step and the
        remedy.

        Returns:
            The fields of `Diagnostics`; empty where the last step had no regulariser.
        """
        seen = self._now.diagnostics
        if seen is None:
            return {}
        values = torch.stack([x.to(seen.drop_ratio) for x in seen]).tolist()
        read = dict(zip(Diagnostics._fields, values, strict=True))
        self._warn_of(read)
        return read

    def _note(
        self, h: Tensor, h_prime: Tensor, n: Tensor, length: Tensor, expected: Tensor
    ) -> None:
        """Keeps what a regulariser saw: both losses, the norms of each tensor, the first order."""
        drop = h - h_prime
        ratio = torch.where(expected > 0, drop.to(expected) / expected, torch.nan)
        both = torch.linalg.vector_norm(n), torch.linalg.vector_norm(length)
        self._now.diagnostics = Diagnostics(h, h_prime, drop, *both, ratio)
        self._now.ratio = smoothed(self._now.ratio, ratio)
        self._now.checked = True
        if self._now.start is None and self.step_count <= self.every:
            self._now.start = h

    def _warn_of(self, values: Mapping[str, float]) -> None:
        if self._now.ratio is None:
            return
        start = torch.nan if self._now.start is None else self._now.start.item()
        ratio, h = self._now.ratio.item(), values["harmful_loss"]
        for kind, text in alarms(self.step_count, ratio, h, start).items():
            self._tell(kind, text)

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._now.told:
            self._now.told.add(kind)
            warnings.warn(text, stacklevel=3)
