"""The Booster step around any optimizer.

With alignment loss f, harmful loss h, intensity λ and step size α, Booster minimises
f(w) + λ·(h(w) − h(w − α·∇h(w)/‖∇h(w)‖)) by stepping a base optimizer on

    g = ∇f(w) + λ·(∇h(w) − ∇h(w′)),    w′ = w − α·∇h(w)/(‖∇h(w)‖ + ε),

where the second-order term is passed straight through (Huang et al., ICLR 2025, Algorithm 1).
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_booster.closure import Closure, GradWatch, HarmfulPasses, run, summed
from torch_booster.distributed import copies, global_norm, local, placed_like
from torch_booster.engine import (
    NO_DEEPSPEED,
    acts_in_backward,
    behind_stand_in,
    is_boundary,
    layers,
    refuse_unservable,
    take_both_closures,
)
from torch_booster.functional import as_float, copying, moved_fraction, norms, perturb_

__all__ = ["BoosterOptimizer", "Diagnostics"]

# Keys in the param groups. The base's own names stay free: RMSprop and ASGD own `alpha`.
LAM = "booster_lam"
ALPHA = "booster_alpha"


class Diagnostics(NamedTuple):
    """What one regulariser saw: 0-dimensional, detached tensors on the device.

    Reading one with `.item()` waits for the device; the step itself never does.
    """

    harmful_loss: Tensor  # h(w)
    perturbed_harmful_loss: Tensor  # h(w′)
    harmful_loss_drop: Tensor  # h(w) − h(w′), the quantity that is being regularised
    harmful_grad_norm: Tensor  # ‖∇h(w)‖ over all trainable parameters
    perturbation_norm: Tensor  # ‖w′ − w‖, measured in weights narrower than 32 bits, else ≈ α


# NOTE: `state`, `param_groups` and `defaults` are the base optimizer's own objects, so schedulers,
# checkpoints and mixed-precision tools see one optimizer. Optimizer.__init__ would build a second
# set of them and is therefore not called; __setstate__ creates the rest (hooks, step profiling).
class BoosterOptimizer(Optimizer):
    r"""Wraps an optimizer so that it steps on the Booster gradient.

    $$ g = \nabla f(w) + \lambda\,\Bigl(\nabla h(w) - \nabla h\bigl(w - \alpha\,
       \tfrac{\nabla h(w)}{\lVert\nabla h(w)\rVert + \varepsilon}\bigr)\Bigr) $$

    f is the alignment loss, h the harmful loss. The norm is one L2 norm over all trainable
    parameters of all groups. Both harmful gradients come from the same closure, hence from the
    same batch. A step costs three forward and backward passes.

    One call, where each closure runs forward and backward and returns its loss:

        loss = opt.step(alignment_closure, harmful_closure)

    In stages, for loops with gradient accumulation, clipping or a GradScaler:

        opt.zero_grad()
        opt.regularize(harmful_closure)     # before the alignment forward pass
        alignment_loss().backward()         # any number of times
        clip_grad_norm_(params, 1.0)        # clips the combined gradient
        opt.step()

    λ and α live in the param groups as `booster_lam` and `booster_alpha`, where a group may set
    its own; they are saved and loaded with the state.

    Memory beyond the gradients: one copy of the trainable weights where the harmful closure only
    accumulates into `.grad`, two where it zeroes or edits `.grad` (or a wrapper such as DDP
    does). Gradients that are present when `regularize` is called are set aside in a further copy.

    Args:
        base_optimizer: An instance of any optimizer for dense gradients that does not need a
            closure itself (not LBFGS).
        lam: λ ≥ 0, regulariser intensity. Zero turns Booster off and skips the harmful passes.
        alpha: α ≥ 0, length of the simulated harmful step, in units of ‖w‖.
        eps: ε ≥ 0, added to the norm.
        replay_rng: Give the second harmful pass the random state of the first, so that dropout
            masks are equal and ∇h(w) − ∇h(w′) measures the perturbation rather than the masks.
        module: Module whose buffers (BatchNorm statistics and the like) the harmful passes must
            leave as they are; without it they move twice a step. FSDP1 needs it for the norm.
        no_sync: Context that keeps gradients local, such as `ddp_model.no_sync`, for the second
            harmful pass. The regulariser is then averaged together with the alignment gradient:
            two all-reduces a step rather than three. Not the default, because it is sound only
            if a synchronised alignment backward follows that accumulates onto `.grad`.
        independent_ranks: The ranks of the process group train models of their own. Otherwise
            a first harmful pass whose gradients nobody averaged is an error.

    Raises:
        TypeError: `base_optimizer` is not an optimizer instance or cannot be wrapped.
        ValueError: `lam`, `alpha` or `eps` is negative or not finite.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = BoosterOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), 5.0, 0.1)
        >>> x, refusal, harmful = torch.randn(8, 4), torch.zeros(8, 1), torch.ones(8, 1)
        >>> def loss_on(target):
        ...     def closure():
        ...         loss = torch.nn.functional.mse_loss(model(x), target)
        ...         loss.backward()
        ...         return loss
        ...     return closure
        >>> opt.zero_grad()
        >>> loss = opt.step(loss_on(refusal), loss_on(harmful))
        >>> bool(opt.diagnostics.harmful_loss_drop > 0)
        True

    Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via
    Attenuating Harmful Perturbation", ICLR 2025, arXiv 2409.01586, Algorithm 1; the defaults are
    the paper's.
    """

    base_optimizer: Optimizer
    eps: float
    replay_rng: bool
    module: nn.Module | None
    no_sync: Callable[[], AbstractContextManager[Any]] | None
    independent_ranks: bool
    diagnostics: Diagnostics | None

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float = 5.0,
        alpha: float = 0.1,
        *,
        eps: float = 1e-7,
        replay_rng: bool = True,
        module: nn.Module | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        independent_ranks: bool = False,
    ) -> None:
        _check_base(base_optimizer)
        self._defaults = {LAM: checked("lam", lam), ALPHA: checked("alpha", alpha)}
        for group in base_optimizer.param_groups:
            for key in self._defaults.keys() & group.keys():
                checked(key, group[key])
        self.__setstate__(
            {
                "base_optimizer": base_optimizer,
                "eps": checked("eps", eps),
                "replay_rng": replay_rng,
                "module": module,
                "no_sync": no_sync,
                "independent_ranks": independent_ranks,
                "diagnostics": None,
                "_regularized": [],
                "_rounding_checked": False,
            }
        )
        self._complete_groups()

    # ------------------------------------------------------------------ the Booster step

    def step(  # type: ignore[override]
        self,
        alignment_closure: Closure | None = None,
        harmful_closure: Closure | None = None,
        *,
        closure: Closure | None = None,
    ) -> Any:
        """Takes one Booster step, or, without closures, one step of the base optimizer.

        Args:
            alignment_closure: Runs forward and backward of f and returns the loss. Its gradients
                are combined with the regulariser afterwards, so it may zero or clip them. Alone,
                after `regularize`, it accumulates onto the regulariser, or does nothing: engines
                such as Lightning hand every step a closure.
            harmful_closure: The same for h, called twice on one batch. Where it zeroes gradients,
                those present before the call are dropped, as with any torch closure.
            closure: torch's keyword for `alignment_closure`.

        Returns:
            What `alignment_closure` returned; None (or the base's result) without closures.

        Raises:
            TypeError: One closure is missing or not callable.
            RuntimeError: A closure made no gradients, or zeroed a regulariser that waits in
                `.grad`. The weights are as they were.
        """
        alignment_closure = alignment_closure if closure is None else closure
        if alignment_closure is None and harmful_closure is None:
            self._regularized.clear()
            return self.base_optimizer.step()
        if harmful_closure is None and (self._regularizer_waits() or not self._is_on()):
            return self._step_on_regularizer(alignment_closure)
        self._between_steps()
        loss = self._combine(alignment_closure, harmful_closure)
        self.base_optimizer.step()
        return loss

    def _combine(self, alignment_closure: Any, harmful_closure: Any) -> Any:
        """Runs both closures and leaves g in `.grad`; off Accelerate's boundary only f's part."""
        alignment_closure = _checked_closure("alignment_closure", alignment_closure)
        harmful_closure = _checked_closure("harmful_closure", harmful_closure)
        self._refuse_second_regularizer()
        on = self._is_on()
        params = self._trainable() if on else {}
        if not on or not is_boundary():
            with torch.enable_grad():
                return alignment_closure()
        difference = self._minus_difference(params, harmful_closure, forget_zeroed=True)
        if self.no_sync is None:
            loss = run(alignment_closure, "alignment_closure", list(params))
            _add_regularizer(params, difference)
        else:
            _add_regularizer(params, difference)
            loss = _run_on_top(
                lambda: run(alignment_closure, "alignment_closure", list(params)), list(params)
            )
        return loss

    def _step_on_regularizer(self, alignment_closure: Any) -> Any:
        """Steps on what `regularize` left in `.grad` and the closure, if it likes, adds to it."""
        alignment_closure = _checked_closure("alignment_closure", alignment_closure)
        params = list(self._trainable()) if self._is_on() else []
        loss = _run_on_top(alignment_closure, params)
        self._regularized.clear()
        self.base_optimizer.step()
        return loss

    def regularize(self, harmful_closure: Closure) -> Tensor | None:
        """Adds λ·(∇h(w) − ∇h(w′)) to `.grad`, once before each plain `step()`.

        Call it before the forward pass of the alignment loss: in between, the weights are
        changed and put back, which invalidates graphs recorded earlier. Gradients already in
        `.grad` are kept and take no part in the perturbation. Those that FSDP2 holds back, under
        `set_requires_gradient_sync(False)`, are not in `.grad`: the harmful passes would be added
        to them, so there it must come before the first micro-batch.

        Args:
            harmful_closure: Runs forward and backward of h and returns the loss; called twice, on
                one batch. It may zero gradients and may loop over micro-batches.

        Returns:
            h(w), detached; None where λ is zero in every group and nothing was run.

        Raises:
            TypeError: `harmful_closure` is not callable or returns no loss.
            RuntimeError: It made no gradients, or the regulariser has been added already.
        """
        booster = behind_stand_in(self)
        if booster is not self:
            return booster.regularize(harmful_closure)
        harmful_closure = _checked_closure("harmful_closure", harmful_closure)
        self._refuse_second_regularizer()
        if not self._is_on():
            return None
        params = self._trainable()
        if self._between_steps():
            return None
        _add_regularizer(params, self._minus_difference(params, harmful_closure))
        self._regularized = [weakref.ref(p.grad) for p in params if p.grad is not None]
        assert self.diagnostics is not None
        return self.diagnostics.harmful_loss

    @torch.no_grad()
    def _minus_difference(
        self,
        groups: dict[Tensor, dict[str, Any]],
        harmful_closure: Closure,
        *,
        forget_zeroed: bool = False,
    ) -> list[Tensor | None]:
        """∇h(w′) − ∇h(w) of each parameter; weights and `.grad` are left as they were."""
        params = list(groups)
        with HarmfulPasses(
            harmful_closure,
            params,
            self.replay_rng,
            self.module,
            self.no_sync or nullcontext,
            self.independent_ranks,
            forget_zeroed,
        ) as harmful:
            h, minus_g = harmful.first()  # h(w), −∇h(w)

            reached = [p for p, g in zip(params, minus_g, strict=True) if g is not None]
            direction = [local(g) for g in minus_g if g is not None]
            alphas = [groups[p][ALPHA] for p in reached]
            lengths = norms(direction)
            n = global_norm(lengths, reached, self.module)  # ‖∇h(w)‖

            live = [local(p) for p in reached]
            w = copies(live)
            # Detached: Ctrl-C may leave gradients enabled, and then leaves refuse to be written.
            restore = copying([p.detach() for p in live], w)
            try:  # w′ = w − α·∇h(w)/(‖∇h(w)‖ + ε)
                moved = perturb_(live, w, direction, lengths, alphas, n, self.eps)
                self._warn_if_rounded_away(live, w, direction)
                h_prime, minus_difference = harmful.second()  # h(w′), ∇h(w′) − ∇h(w)
            finally:
                restore()

        moved_norm = global_norm(moved, reached, self.module)
        self.diagnostics = Diagnostics(h, h_prime, h - h_prime, n, moved_norm)
        return minus_difference

    def _warn_if_rounded_away(
        self, live: Sequence[Tensor], w: Sequence[Tensor], direction: Sequence[Tensor]
    ) -> None:
        """Looks once, since looking waits for the device."""
        if self._rounding_checked:
            return
        self._rounding_checked = True
        found = moved_fraction(live, w, direction)
        if found is not None and found[0] < 0.9:
            fraction, dtype = found
            warnings.warn(
                f"Rounding to {dtype} moved only {fraction:.0%} of the weights that the Booster "
                "perturbation should have moved, so the regulariser sees another perturbation "
                "than the one asked for. Keep the trainable weights (such as LoRA adapters) in "
                "float32, or raise alpha and watch diagnostics.perturbation_norm.",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ hyperparameters

    @property
    def lam(self) -> float:
        """λ, regulariser intensity. Setting it sets every group."""
        return self._uniform("lam", LAM)

    @lam.setter
    def lam(self, value: float) -> None:
        self._set("lam", LAM, value)

    @property
    def alpha(self) -> float:
        """α, length of the simulated harmful step. Setting it sets every group."""
        return self._uniform("alpha", ALPHA)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._set("alpha", ALPHA, value)

    def _uniform(self, name: str, key: str) -> float:
        self._complete_groups()
        values = [group[key] for group in self.param_groups]
        if len(set(values)) > 1:
            raise ValueError(
                f"The param groups have different {name}: {values}. "
                f"Read opt.param_groups[i][{key!r}] instead."
            )
        return values[0]

    def _set(self, name: str, key: str, value: float) -> None:
        self._defaults[key] = checked(name, value)
        for group in self.param_groups:
            group[key] = self._defaults[key]

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for key, value in self._defaults.items():
                group.setdefault(key, value)

    def _trainable(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter that requires a gradient, without repetition."""
        refuse_unservable()
        for group in self.param_groups:
            if any(hasattr(p, "ds_id") for p in group["params"]):
                raise RuntimeError(NO_DEEPSPEED)
        params = {
            p: group for group in self.param_groups for p in group["params"] if p.requires_grad
        }
        if not params:
            raise RuntimeError(
                f"No parameter of the {type(self.base_optimizer).__name__} requires a gradient, so "
                "there is none to regularise. Unfreeze some; where optimizers step in the backward "
                "pass (layer-wise), use one that steps in step()."
            )
        return params

    def _is_on(self) -> bool:
        self._complete_groups()
        for group in self.param_groups:
            for key in self._defaults:
                checked(key, group[key])
        return any(group[LAM] != 0 for group in self.param_groups)

    # ------------------------------------------------------------------ the Optimizer contract

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base_optimizer.state = value

    @property
    def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's param groups, with `booster_lam` and `booster_alpha` in each."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base_optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them a regulariser that was added."""
        self._regularized.clear()
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; it may bring its own `booster_lam` and `_alpha`."""
        for key in self._defaults.keys() & param_group.keys():
            checked(key, param_group[key])
        self.base_optimizer.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; λ and α are in its param groups."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._complete_groups()
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state saved by this class or by the bare base optimizer.

        A state without λ and α, as the bare optimizer saves it, leaves those in force.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._complete_groups()
        in_force = [{key: group[key] for key in self._defaults} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, hyperparameters in zip(self.param_groups, in_force, strict=True):
            for key, value in hyperparameters.items():
                group.setdefault(key, value)
        self._regularized.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def train(self) -> None:
        """Switches base optimizers that distinguish training from evaluation (schedule-free)."""
        getattr(self.base_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Switches base optimizers that distinguish training from evaluation (schedule-free)."""
        getattr(self.base_optimizer, "eval", lambda: None)()

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks and what a scheduler patched onto the instance stay behind.
        public = ("base_optimizer", "eps", "replay_rng", "module", "no_sync", "independent_ranks")
        private = ("diagnostics", "_defaults", "_rounding_checked")
        return {name: self.__dict__[name] for name in (*public, *private)} | {"_regularized": []}

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Answers Accelerate's `prepare`, which asks before it wraps an optimizer."""
        if hasattr(self.base_optimizer, "gradient_state"):
            raise TypeError(
                "The base optimizer has been prepared already and would step, and be unscaled, "
                "twice. Prepare either the base optimizer or the BoosterOptimizer."
            )
        take_both_closures(BoosterOptimizer)
        return False

    def _between_steps(self) -> bool:
        """Whether a prepared base optimizer waits for further micro-batches."""
        if is_boundary():
            return False
        if hasattr(self.base_optimizer, "gradient_state"):
            return True
        raise RuntimeError(
            "Within accelerator.accumulate this micro-batch does not step, and a harmful pass here "
            "would see gradients that no rank has shared. Call "
            "torch_booster.integrations.accelerate.regularize(optimizer, harmful_closure), or step "
            "on what accelerator.prepare returned; both wait for the micro-batch that steps."
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Answers GradScaler, which asks before it unscales, and refuses its closures in time."""
        caller = sys._getframe(1).f_locals
        if any(callable(argument) for argument in caller.get("args", ())):
            raise RuntimeError(
                "GradScaler cannot step through closures: it unscales before they run. Use the "
                "stages: opt.regularize(harmful_closure), scaler.scale(loss).backward(), "
                "scaler.step(opt), with scaler.scale(loss).backward() in the harmful closure too."
            )
        return False

    def _regularizer_waits(self) -> bool:
        # Gradients rather than a flag: where a GradScaler skips the step and model.zero_grad()
        # drops them, nobody tells this optimizer.
        held = {id(ref()) for ref in self._regularized} - {id(None)}
        return bool(held & {id(p.grad) for group in self.param_groups for p in group["params"]})

    def _refuse_second_regularizer(self) -> None:
        if self._regularizer_waits():
            raise RuntimeError(
                "The regulariser is already in .grad and would be counted twice. Call regularize "
                "once for each optimizer step, or drop the gradients with opt.zero_grad() first."
            )


def _run_on_top(alignment_closure: Closure, params: list[Tensor]) -> Any:
    """Runs the alignment closure on a regulariser that waits in `.grad` to be added to."""
    waiting = [p for p in params if p.grad is not None]
    with GradWatch(waiting) as watch, torch.enable_grad():
        loss = alignment_closure()
    if watch.zeroed or any(p.grad is None for p in waiting):
        raise RuntimeError(
            "alignment_closure zeroed the regulariser, which waits in .grad after regularize() and "
            "with no_sync (so that one all-reduce averages it together with the alignment "
            "gradient). Let the closure accumulate, and call opt.zero_grad() before."
        )
    return loss


def _add_regularizer(
    params: dict[Tensor, dict[str, Any]], minus_difference: Sequence[Tensor | None]
) -> None:
    """Adds −λ·(∇h(w′) − ∇h(w)) to `.grad`."""
    with torch.no_grad():
        grads = [None if p.grad is None else placed_like(p.grad, p) for p in params]
        lams = [group[LAM] for group in params.values()]
        added = [d if lam else None for d, lam in zip(minus_difference, lams, strict=True)]
        total = summed(grads, added, list(params), [-lam for lam in lams])
        for param, grad in zip(params, total, strict=True):
            param.grad = grad


def _check_base(base_optimizer: Any) -> None:
    if isinstance(base_optimizer, type):
        raise TypeError(
            f"base_optimizer must be an instance, got the class {base_optimizer.__name__}. Pass "
            f"{base_optimizer.__name__}(model.parameters(), ...)."
        )
    if not isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer must be a torch.optim.Optimizer, got {base_optimizer!r}. A wrapper "
            "that is none (such as schedule-free's) may go around BoosterOptimizer instead: call "
            "regularize on the inner optimizer and step on the wrapper."
        )
    for layer in layers(base_optimizer):
        if isinstance(layer, BoosterOptimizer):
            raise TypeError("base_optimizer is a BoosterOptimizer already; wrap it once.")
        if "deepspeed" in type(layer).__module__:
            raise TypeError(f"base_optimizer is a {type(layer).__name__}. {NO_DEEPSPEED}")
    name = type(base_optimizer).__name__
    if isinstance(base_optimizer, torch.optim.SparseAdam):
        raise TypeError(f"{name} takes sparse gradients only, and Booster's arithmetic is dense.")
    if acts_in_backward(base_optimizer):
        raise TypeError(
            f"{name} has hooks on the gradients of its parameters, as optimizers do that step or "
            "offload during the backward pass. It would take the gradients of the harmful passes "
            "for its own. Use an optimizer that reads .grad in step()."
        )
    if any(hasattr(base_optimizer, method) for method in ("first_step", "set_closure")):
        raise TypeError(
            f"{name} evaluates the gradient again within its step (as SAM does), and would replace "
            "the Booster gradient by the alignment gradient. Use an optimizer that reads .grad."
        )
    closure = inspect.signature(base_optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name}.step needs a closure, which it may call several times a step; the Booster "
            "gradient is computed once a step. Use an optimizer whose step() works without."
        )


def _checked_closure(name: str, closure: Closure | None) -> Closure:
    if closure is None:
        raise TypeError(
            f"step() is missing {name}. Give both closures, or call regularize(harmful_closure), "
            "loss.backward() and then step() without arguments. Lightning's automatic optimization "
            "gives one closure: optimize manually, or override optimizer_step to give both."
        )
    if not callable(closure):
        raise TypeError(
            f"{name} must be callable, got {closure!r}. Pass the function, not its result."
        )
    return closure


def checked(name: str, value: Any) -> float:
    """A hyperparameter as a float.

    Args:
        name: What to call it in an error.
        value: Any finite real number that is not negative.

    Returns:
        `value` as a float.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    number = as_float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}.")
    return number
