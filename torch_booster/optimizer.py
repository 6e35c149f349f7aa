"""The Booster step around any optimizer.

With alignment loss f, harmful loss h, intensity λ and step size α, Booster minimises
f(w) + λ·(h(w) − h(w − α·∇h(w)/‖∇h(w)‖)) by stepping a base optimizer on

    g = ∇f(w) + λ·(∇h(w) − ∇h(w′)),    w′ = w − α·∇h(w)/(‖∇h(w)‖ + ε),

where the second-order term is passed straight through (Huang et al., ICLR 2025, Algorithm 1).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_booster.checks import (
    checked,
    checked_base,
    checked_closure,
    checked_perturbed,
    checked_share,
    layers,
)
from torch_booster.closure import (
    Closure,
    Grads,
    HarmfulPasses,
    Waiting,
    add_scaled,
    insist_on_gradients,
    set_aside,
)
from torch_booster.diagnostics import Diagnostics, warn_of_passes
from torch_booster.distributed import averaged, copies, local, refuse_unequal, tensor_norms
from torch_booster.functional import (
    copying,
    entries,
    filled,
    moved_fraction,
    norms,
    perturb_,
    step_sizes,
)
from torch_booster.hyperparameters import REGION, STEP, Hyperparameters, Now
from torch_booster.signals import handlers_wait

__all__ = ["BoosterOptimizer", "Diagnostics"]


def _of_base(name: str, doc: str) -> Any:
    """An attribute that is the base optimizer's own."""

    def get(self: BoosterOptimizer) -> Any:
        return getattr(self.base_optimizer, name)

    def put(self: BoosterOptimizer, value: Any) -> None:
        setattr(self.base_optimizer, name, value)

    return property(get, put, doc=doc)


def _on_base(name: str) -> Any:
    """Registers a hook on the optimizer that really steps, which torch's own hooks are run by."""

    @functools.wraps(getattr(Optimizer, name))
    def register(
        self: BoosterOptimizer, hook: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        def with_booster(_: Optimizer, *rest: Any) -> Any:
            return hook(self, *rest)

        return getattr(self._stepping, name)(with_booster, *args, **kwargs)

    return register


# NOTE: `state`, `param_groups`, `defaults` and the hooks are the base optimizer's own, so
# schedulers, checkpoints and mixed-precision tools see one optimizer. Optimizer.__init__ would
# build a second set of them and run process-wide hooks twice; it is therefore not called.
class BoosterOptimizer(Hyperparameters, Optimizer):
    r"""Wraps an optimizer so that it steps on the Booster gradient.

    $$ g = \nabla f(w) + \lambda\,\Bigl(\nabla h(w) - \nabla h\bigl(w - \alpha\,
       \tfrac{\nabla h(w)}{\lVert\nabla h(w)\rVert + \varepsilon}\bigr)\Bigr) $$

    f is the alignment loss, h the harmful loss. The norm is one L2 norm over all trainable
    parameters of all groups, or, with `norm="tensor"`, one for each tensor:
    w′ᵢ = wᵢ − (α/√n)·∇ᵢh/(‖∇ᵢh‖ + ε) over the n tensors whose gradient is not zero. A step is

    1. `zero_grad()`
    2. `regularize(harmful_closure)`: two passes of one harmful batch add λ·(∇h(w) − ∇h(w′)) to
       `.grad`; the weights come back bit for bit. Before the alignment forward pass.
    3. the user's alignment passes, any number of them, which add ∇f(w); clipping; unscaling
    4. `step()`: the base optimizer's

    `backward(alignment_closure, harmful_closure)` is 2 and 3, and
    `step(alignment_closure, harmful_closure)` is 2 to 4 in one call. Closures run forward and
    backward and return their loss; they may zero gradients, loop over micro-batches, or raise.
    Each harmful pass starts on an empty `.grad` and what it leaves there is its gradient.

    λ, α and the number of steps taken live in the param groups as `booster_lam`, `booster_alpha`
    and `booster_step`; a group may set its own λ and α. They are saved and loaded with the state,
    and with a trust region `booster_trust_region`, the share of α that is in force.
    Where a group maximises, f is a reward and the regulariser's sign follows.

    Memory beyond the gradients: two copies of the trainable weights, and one of the gradients that
    are there when `regularize` is called.

    Args:
        base_optimizer: An instance of any optimizer for dense gradients that reads `.grad` and
            does not need a closure itself (not LBFGS).
        lam: λ ≥ 0, regulariser intensity. Zero turns Booster off and skips the harmful passes.
        alpha: α ≥ 0, length of the simulated harmful step, in units of ‖w‖.
        norm: "global", the paper's one norm, or "tensor".
        perturbed: The weights v that the simulated step moves, where they are not those that
            train: w′ = (w, v − α·∇ᵥh/(‖∇ᵥh‖ + ε)). With an adapter that will be merged, the weights
            into which it will be (`torch_booster.integrations.peft`). They may be frozen: they take
            part in the first harmful pass and never move for good, with the α that all groups
            share, else this `alpha`. Floating-point tensors that no one shards; across processes
            their gradients are averaged. A list of them that is a context manager too is entered
            around the harmful passes.
        lam_warmup_steps: T ≥ 0; λ·min(1, t/T) is in force at step t = 0, 1, …
        lam_delay_steps: D ≥ 0; steps before that, in which λ is 0.
        every: k ≥ 1; the regulariser comes at steps 0, k, 2k, …, k times as heavy.
        eps: ε ≥ 0, added to the norm.
        trust_region: α is a radius that adapts: after a regulariser at which h falls by less than a
            quarter of what its gradient promises, or rises, α is halved; after any other it grows
            back by 5 %. Where h falls as promised nothing changes. Waits for the device each time.
        replay_rng: Give both harmful passes one random state (torch's, numpy's and Python's global
            generators), so that dropout masks are equal and ∇h(w) − ∇h(w′) measures the
            perturbation rather than the masks.
        module: The model. The harmful passes then leave its buffers (BatchNorm statistics and the
            like) and the gradients of parameters that other optimizers hold as they are. FSDP1
            needs it for the norm.
        no_sync: Context that keeps gradients local, such as `ddp_model.no_sync`, for the second
            harmful pass. The regulariser is then averaged together with the alignment gradient:
            two all-reduces a step rather than three. Not the default, because it is sound only
            if a synchronised alignment backward follows that accumulates onto `.grad`.
        independent_ranks: The ranks of the process group train models of their own. Otherwise
            a first harmful pass whose gradients nobody averaged is an error.
        accumulates: The harmful closure does nothing to `.grad` but accumulate. Saves one of the
            two copies.
        self_check: Look at the first regulariser, by one more harmful pass, whether the closure is
            one function of the weights and the ranks agree. It waits for the device, once.

    Raises:
        TypeError: `base_optimizer` is not an optimizer instance or cannot be wrapped.
        ValueError: A hyperparameter is out of its range.

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
        >>> opt.read_diagnostics()["harmful_loss_drop"] > 0
        True

    Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via
    Attenuating Harmful Perturbation", ICLR 2025, arXiv 2409.01586, Algorithm 1; the defaults are
    the paper's. Warm-up, the norm for each tensor and the trust region are not.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        lam: float = 5.0,
        alpha: float = 0.1,
        *,
        norm: Literal["global", "tensor"] = "global",
        perturbed: Iterable[Tensor] | None = None,
        lam_warmup_steps: int = 0,
        lam_delay_steps: int = 0,
        every: int = 1,
        eps: float = 1e-7,
        trust_region: bool = False,
        replay_rng: bool = True,
        module: nn.Module | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        independent_ranks: bool = False,
        accumulates: bool = False,
        self_check: bool = True,
    ) -> None:
        self.base_optimizer = checked_base(base_optimizer, BoosterOptimizer)
        self._now = Now(checked=not self_check)
        self._set(lam, alpha, norm, lam_warmup_steps, lam_delay_steps, every, eps, trust_region)
        self._self_check = self_check
        self.perturbed = perturbed
        self.replay_rng = replay_rng
        self.module = module
        self.no_sync = no_sync
        self.independent_ranks = independent_ranks
        self.accumulates = accumulates
        self._begin()

    @property
    def perturbed(self) -> Collection[Tensor] | None:
        """The weights that the simulated step moves; None for all that train."""
        return self._perturbed if isinstance(self._around, nullcontext) else self._around

    @perturbed.setter
    def perturbed(self, weights: Iterable[Tensor] | None) -> None:
        self._perturbed = None if weights is None else checked_perturbed(weights)
        entered = isinstance(weights, AbstractContextManager)
        self._around: Any = weights if entered else nullcontext()
        self._now.checked = not self._self_check  # other weights, other things to go wrong

    def _begin(self) -> None:
        *_, self._stepping = layers(self.base_optimizer)  # others may hold a step back
        booster = weakref.ref(self)

        def taken(*_: Any) -> None:
            if (self := booster()) is not None:
                self._step_taken()

        self._counts = not hasattr(self._stepping, "_optimizer_step_post_hooks")
        if not self._counts:  # an optimizer that has not initialised torch's runs no hooks
            self._stepping.register_step_post_hook(taken)
        self._groups()

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
            alignment_closure: Runs forward and backward of f and returns the loss. The regulariser
                is added afterwards, so it may zero gradients or clip them. Alone, after
                `regularize`, it may also do nothing: engines hand every step a closure.
            harmful_closure: The same for h, called twice on one batch.
            closure: torch's keyword for `alignment_closure`.

        Returns:
            What `alignment_closure` returned; None (or the base's result) without closures.

        Raises:
            TypeError: One closure is missing or not callable.
            RuntimeError: A closure made no gradients. The weights are as they were.
        """
        alignment_closure = alignment_closure if closure is None else closure
        if alignment_closure is None and harmful_closure is None:
            return self._step_base()
        waiting = self._now.waiting
        waits = waiting is not None and waiting.is_there()
        if harmful_closure is None and (waits or not self.is_due()):
            loss = self._join(checked_closure("alignment_closure", alignment_closure))
        else:
            loss = self.backward(alignment_closure, harmful_closure)
        self._step_base()
        return loss

    def backward(self, alignment_closure: Closure | None, harmful_closure: Closure | None) -> Any:
        """Runs both closures and leaves g = ∇f(w) + λ·(∇h(w) − ∇h(w′)) in `.grad`.

        Returns:
            What `alignment_closure` returned.
        """
        f = checked_closure("alignment_closure", alignment_closure)
        h = checked_closure("harmful_closure", harmful_closure)
        self._refuse_engine()
        return self._backward(f, h)

    def _backward(self, f: Closure, h: Closure, loss_scale: float = 1.0) -> Any:
        self._refuse_second_regularizer()
        if not self.is_due():
            with torch.enable_grad():
                return f()
        groups = self._trainable()
        difference = self._difference(groups, h)
        self._adapt_alpha(loss_scale, self.independent_ranks)
        if self.no_sync is not None:  # one all-reduce averages it with the alignment gradient
            self._add(groups, difference)
            return self._join(f)
        with torch.enable_grad():
            loss = f()
        insist_on_gradients("alignment_closure", list(groups))
        self._add(groups, difference)
        return loss

    def regularize(self, harmful_closure: Closure, *, loss_scale: float = 1.0) -> Tensor | None:
        """Adds λ·(∇h(w) − ∇h(w′)) to `.grad`, once before each plain `step()`.

        Call it before the forward pass of the alignment loss: in between, the weights are
        changed and put back, which invalidates graphs recorded earlier. Gradients already in
        `.grad` are kept and take no part in the perturbation. Those that FSDP2 holds back, under
        `set_requires_gradient_sync(False)`, are not in `.grad`: the harmful passes would be added
        to them, so there it must come before the first micro-batch.

        Args:
            harmful_closure: Runs forward and backward of h and returns the loss; called twice, on
                one batch. It may zero gradients and may loop over micro-batches.
            loss_scale: > 0, by which the gradients that it makes are larger than those of the loss
                that it returns: a GradScaler's scale. For the trust region alone.

        Returns:
            h(w), detached; None where λ is zero at this step and nothing was run.

        Raises:
            TypeError: `harmful_closure` is not callable or returns no loss.
            ValueError: `loss_scale` is not above 0.
            RuntimeError: It made no gradients, or the regulariser has been added already.
        """
        h = checked_closure("harmful_closure", harmful_closure)
        if not checked("loss_scale", loss_scale):
            raise ValueError("loss_scale is 0. Pass the scale of the gradients, 1.0 where none is.")
        self._refuse_engine()
        return self._regularize(h, loss_scale)

    def _regularize(self, h: Closure, loss_scale: float = 1.0) -> Tensor | None:
        self._refuse_second_regularizer()
        if not self.is_due():
            return None
        groups = self._trainable()
        difference = self._difference(groups, h)
        self._adapt_alpha(loss_scale, self.independent_ranks)
        self._add(groups, difference)
        return self._now.diagnostics.harmful_loss if self._now.diagnostics is not None else None

    @torch.no_grad()
    def _difference(self, groups: dict[Tensor, dict[str, Any]], harmful_closure: Closure) -> Grads:
        """∇h(w) − ∇h(w′) of each parameter; weights and `.grad` are left as they were."""
        if self.norm == "tensor" and any(getattr(p, "_is_flat_param", False) for p in groups):
            raise RuntimeError(
                "FSDP1 has flattened several tensors into one, so that they would share a norm. "
                "Pass FullyShardedDataParallel(..., use_orig_params=True)."
            )
        trained, frozen = [*groups], [p for p in self._perturbed or () if p not in groups]
        params = [*trained, *frozen]
        alphas = [self._alpha(g) for g in groups.values()] + [self._own_alpha()] * len(frozen)
        options = self.replay_rng, self.module, self.accumulates
        passes = HarmfulPasses(harmful_closure, trained, frozen, *options)
        with handlers_wait(), self._around, passes as harmful:
            trial = None if self._now.checked else harmful.trial()
            h, g = harmful.run()  # h(w), ∇h(w)
            along = g if self._perturbed is None else self._along(g, trained, frozen)

            # Detached: Ctrl-C may leave gradients enabled, and then leaves refuse to be written.
            live = local(p.detach() for p, x in zip(params, along, strict=True) if x is not None)
            direction = local(x for x in along if x is not None)
            n = tensor_norms(filled(along, norms(direction)), params, self.module)  # ‖∇ᵢh(w)‖
            s = step_sizes(n, alphas, self.norm, self.eps)  # α/(‖∇h(w)‖ + ε)
            expected = (s * n * n).sum()  # h(w) − h(w′) to first order
            if trial is not None and not self.independent_ranks:
                refuse_unequal(torch.linalg.vector_norm(n))

            w = copies(live)
            restore = copying(live, w)
            try:
                moved = perturb_(live, w, direction, entries(s, along))  # w′ = w − s·∇h(w)
                rounded = None if trial is None else moved_fraction(live, w, direction)
                h_prime, difference = harmful.run_against(g, self.no_sync)  # ∇h(w) − ∇h(w′)
            finally:
                restore()

        length = s * n if moved is None else tensor_norms(filled(along, moved), params, self.module)
        if trial is not None:
            wanted = len(live if self._perturbed is None else self._perturbed)
            warn_of_passes(trial, h, h - h_prime, rounded, (wanted - len(live), wanted))
        self._note(h, h_prime, n, length, expected)
        return difference[: len(trained)]

    def _along(self, g: Grads, trained: Sequence[Tensor], frozen: Sequence[Tensor]) -> Grads:
        """The gradients along which `perturbed` moves, None for weights that stay."""
        n = len(trained)
        if frozen and not self.independent_ranks:  # nobody else averages theirs
            if not self._now.checked:
                lengths = norms(local(x for x in g[:n] if x is not None))
                whole = tensor_norms(filled(g[:n], lengths), trained, self.module)
                refuse_unequal(torch.linalg.vector_norm(whole))
            g[n:] = averaged(g[n:], frozen)
        moves = {*(self._perturbed or ())}
        along = [x if p in moves else None for p, x in zip((*trained, *frozen), g, strict=True)]
        there = [x for x in along if x is not None]
        if not there or not (self._now.checked or any(x.any() for x in there)):
            raise RuntimeError(
                "harmful_closure made no gradient of any weight in perturbed, so that there is no "
                "direction to move them in. Pass weights of the model that it runs, with the "
                "adapters active that were so when you took them, and leave out kernels that give "
                "frozen weights no gradient (fused LoRA, Unsloth's)."
            )
        return along

    def _add(self, groups: dict[Tensor, dict[str, Any]], difference: Grads) -> None:
        """Adds λ·(∇h(w) − ∇h(w′)) to `.grad`."""
        with torch.no_grad():
            added = add_scaled(list(groups), difference, [self._lam(g) for g in groups.values()])
        self._now.waiting = Waiting(added)

    def _join(self, alignment_closure: Closure) -> Any:
        """Runs an alignment closure while the regulariser waits in `.grad`, or set aside."""
        waiting = self._now.waiting
        if self.no_sync is None and waiting is not None:
            waiting.end()
            with set_aside(list(self._trainable())) as params, torch.enable_grad():
                loss = alignment_closure()
            self._now.waiting = Waiting(params)
            return loss
        with torch.enable_grad():
            loss = alignment_closure()
        if waiting is not None and not (waiting.is_there() and waiting is self._now.waiting):
            raise RuntimeError(
                "alignment_closure zeroed the regulariser, which with no_sync waits in .grad, so "
                "that one all-reduce averages it together with the alignment gradient. Let the "
                "closure accumulate, and call opt.zero_grad() before."
            )
        return loss

    def _step_base(self) -> Any:
        result = self.base_optimizer.step()
        if self._counts:
            self._step_taken()
        return result

    def _step_taken(self) -> None:
        """Runs after each step of the optimizer that steps, whoever called it."""
        for group in self.param_groups:  # first, so that Ctrl-C hardly comes between
            group[STEP] += 1
        waiting = self._now.waiting
        self._end_waiting()
        if waiting is None or waiting.lost:
            self._now.diagnostics = None
            due = any(self._lam(group, group[STEP] - 1) for group in self.param_groups)
            if due and any(group.get("lr", 1.0) != 0 for group in self.param_groups):
                self._tell(
                    "plain",
                    "This step had no regulariser although λ is not zero: regularize() was not "
                    "called before it, or zero_grad() dropped what it had added. Call "
                    "opt.zero_grad(), opt.regularize(harmful_closure), backward(), opt.step() in "
                    "this order, or set opt.lam = 0 for plain steps.",
                )

    def _end_waiting(self) -> None:
        if self._now.waiting is not None:
            self._now.waiting.end()
        self._now.waiting = None

    def _refuse_second_regularizer(self) -> None:
        if self._now.waiting is not None and self._now.waiting.is_there():
            raise RuntimeError(
                "The regulariser is already in .grad and would be counted twice. Call regularize "
                "once for each optimizer step, or drop the gradients with opt.zero_grad() first."
            )
        self._end_waiting()

    def _refuse_engine(self) -> None:
        states = [getattr(layer, "gradient_state", None) for layer in layers(self.base_optimizer)]
        if self._now.prepared or any(state.num_steps > 1 for state in states if state is not None):
            raise RuntimeError(
                "Accelerate prepared this optimizer: it holds steps back and divides losses, λ "
                "among them. Call regularize(optimizer, harmful_closure) or step(optimizer, "
                "alignment_closure, harmful_closure) of torch_booster.integrations.accelerate, "
                "which wait for the micro-batch that steps and keep λ whole."
            )

    # ------------------------------------------------------------------ checking

    def check(self, harmful_closure: Closure) -> None:
        """Looks once more whether a harmful closure is one function of the weights.

        Runs three harmful passes and changes nothing. Warns where h(w) does not repeat, raises
        where a pass changes weights or ranks disagree, as the first regulariser does by itself.
        """
        h, seen = checked_closure("harmful_closure", harmful_closure), self._now.diagnostics
        self._now.checked = False
        self._difference(self._trainable(), h)
        self._now.diagnostics = seen
        if self._now.waiting is not None:  # it has come back as a copy
            self._now.waiting = self._now.waiting.anew()

    def _trainable(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter that requires a gradient, without repetition."""
        params = {p: group for group in self._groups() for p in group["params"] if p.requires_grad}
        if not params:
            raise RuntimeError(
                f"No parameter of the {type(self.base_optimizer).__name__} requires a gradient, so "
                "there is none to regularise. Unfreeze some; where optimizers step in the backward "
                "pass (layer-wise), use one that steps in step()."
            )
        return params

    # ------------------------------------------------------------------ the Optimizer contract

    state: Any = _of_base("state", "The base optimizer's state.")
    param_groups: Any = _of_base("param_groups", "The base's, with `booster_lam` and its fellows.")
    defaults: dict[str, Any] = _of_base("defaults", "The base optimizer's defaults.")

    register_step_pre_hook = _on_base("register_step_pre_hook")
    register_step_post_hook = _on_base("register_step_post_hook")
    register_state_dict_pre_hook = _on_base("register_state_dict_pre_hook")
    register_state_dict_post_hook = _on_base("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _on_base("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _on_base("register_load_state_dict_post_hook")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them a regulariser that was added."""
        self.base_optimizer.zero_grad(set_to_none)
        waiting = self._now.waiting
        # A base that Accelerate prepared keeps the gradients until the micro-batch that steps.
        if waiting is not None and not (set_to_none and waiting.is_there()):
            self._end_waiting()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; it may bring its own `booster_lam` and `_alpha`."""
        for key in self._defaults.keys() & param_group.keys():
            checked(key, param_group[key])
        if REGION in param_group:
            checked_share(REGION, param_group[REGION])
        self.base_optimizer.add_param_group(param_group)
        self._groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; λ, α and the steps taken are in its param groups."""
        self._groups()
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state saved by this class or by the bare base optimizer.

        A state without λ, α and steps, as the bare optimizer saves it, leaves those in force.
        """
        keys = {*self._defaults, STEP, REGION}
        in_force = [{key: group[key] for key in keys & {*group}} for group in self._groups()]
        self.base_optimizer.load_state_dict(state_dict)
        for group, hyperparameters in zip(self.param_groups, in_force, strict=True):
            if STEP in group:  # of this class, without a trust region: the whole α
                hyperparameters.pop(REGION, None)
            for key, value in hyperparameters.items():
                group.setdefault(key, value)
        self._end_waiting()
        self._now.diagnostics = self._now.start = self._now.ratio = None

    def train(self) -> None:
        """Switches base optimizers that distinguish training from evaluation (schedule-free)."""
        getattr(self.base_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Switches base optimizers that distinguish training from evaluation (schedule-free)."""
        getattr(self.base_optimizer, "eval", lambda: None)()

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks and what a scheduler patched onto the instance stay behind.
        kept = {k: v for k, v in vars(self).items() if k not in ("step", "_stepping")}
        return kept | {"_now": replace(self._now, waiting=None, told={*self._now.told})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Answers Accelerate's `prepare`, which asks before it wraps an optimizer."""
        if any(hasattr(layer, "gradient_state") for layer in layers(self.base_optimizer)):
            raise TypeError(
                "The base optimizer has been prepared already and would step, and be unscaled, "
                "twice. Prepare either the base optimizer or the BoosterOptimizer."
            )
        self._now.prepared = True
        return False
