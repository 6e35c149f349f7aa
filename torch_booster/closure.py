"""The harmful closure, run at w and at w′: each time on an empty `.grad` and on one function.

A closure is the user's code. It may zero gradients or leave them, loop over micro-batches, clip,
draw dropout masks, or raise. What it leaves in `.grad` is the gradient; gradients from before,
randomness and buffers are put back around it.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torch_booster.checks import as_float, shown
from torch_booster.distributed import copies, local, placed_like
from torch_booster.functional import add_, copying, filled, norms, scale_, subtract_

__all__ = [
    "Buffers",
    "Closure",
    "Grads",
    "HarmfulPasses",
    "RandomState",
    "Waiting",
    "add_scaled",
    "insist_on_gradients",
    "loss_of",
    "set_aside",
]

Closure = Callable[[], Tensor | float]
Grads = list[Tensor | None]


class HarmfulPasses:
    """∇h at w and again at w′ ("regrad"), through one closure.

    On exit every `.grad` is again what it was, as a copy, and so are the buffers.

    Args:
        closure: The harmful closure.
        params: The trainable parameters.
        frozen: Weights beside them, of which the first pass alone makes a gradient.
        replay_rng: Give each pass the random state of the first (equal dropout masks).
        module: Module whose buffers and whose other parameters' gradients are put back.
        accumulates: The closure promises to do nothing but accumulate into `.grad`.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        frozen: Sequence[Tensor],
        replay_rng: bool,
        module: nn.Module | None,
        accumulates: bool,
    ) -> None:
        self._closure = closure
        self._params = [*params, *frozen]
        self._trained, self._frozen = params, frozen
        self._module = module
        self._accumulates = accumulates
        self._rng = RandomState() if replay_rng else None
        ours = {*self._params}
        self._buffers = Buffers(module, ours)
        everything = () if module is None else module.parameters()
        others = [p for p in everything if p.requires_grad and p not in ours]
        self._held = [*self._params, *others]
        self._kept: Grads = [None] * len(self._held)

    def __enter__(self) -> HarmfulPasses:
        _refuse_sparse("the loop", self._params)
        # Copies: data parallelism may keep the tensors themselves, and write to them.
        self._kept = _copied([p.grad for p in self._held])
        return self

    def __exit__(self, *_: object) -> None:
        for param, kept in zip(self._held, self._kept, strict=True):
            param.grad = kept
        self._buffers.restore()
        torch.clear_autocast_cache()

    def trial(self) -> Tensor:
        """Runs the closure once and looks at what it did; waits for the device.

        Returns:
            h(w), which the next run must find again.

        Raises:
            RuntimeError: The pass changed weights, which are put back, or zeroed gradients in
                spite of `accumulates`.
        """
        live = local(p.detach() for p in self._params if p.untyped_storage().nbytes())
        w = copies(live)
        try:
            loss, g = self.run()
        finally:
            same = (torch.allclose(p, w_p, 0, 0, True) for p, w_p in zip(live, w, strict=True))
            if not all(same):
                copying(live, w)()
                raise RuntimeError(_CHANGED_WEIGHTS)
        strangers = [] if self._module is not None else self._strangers()
        if strangers:
            shapes = ", ".join(str(tuple(x.shape)) for x in strangers[:3])
            warnings.warn(
                f"The harmful pass left gradients on {len(strangers)} tensors that this optimizer "
                f"does not hold (of shapes {shapes}). An optimizer that holds them would train "
                "them towards harm. Pass BoosterOptimizer(..., module=model), which puts their "
                "gradients back, or freeze them.",
                stacklevel=6,
            )
        if self._accumulates:
            n = len(self._trained)
            length = _length(g[:n])
            _, left = self.run_against(g)  # ∇h(w) − ∇h(w)
            if _length(left[:n]) > 0.01 * length:
                raise RuntimeError(_NOT_ACCUMULATED)
        return loss

    def run(self) -> tuple[Tensor, Grads]:
        """Runs the closure where the weights are.

        Returns:
            The loss, and its gradients as copies, None for parameters that it does not reach.
        """
        with _asking_gradients(self._frozen):
            loss = self._call([None] * len(self._params))
        grads = self._made()
        if not self._accumulates:  # else the next pass goes on top of them
            n = len(self._trained)  # what is frozen has served when the next pass begins
            grads[:n] = _copied(grads[:n])
        return loss, grads

    def run_against(
        self, g: Grads, context: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> tuple[Tensor, Grads]:
        """Runs the closure again, elsewhere, on the randomness and the buffers of the first pass.

        Args:
            g: Gradients of the first pass, which become the difference.
            context: Around the pass, such as DDP's `no_sync`.

        Returns:
            The loss here, and g − its gradients, None for parameters that neither pass reached.
        """
        if self._accumulates:
            _negate(g)  # the closure adds ∇h(w′) to −∇h(w)
        with (context or nullcontext)():
            loss = self._call(g if self._accumulates else [None] * len(g))
        made = self._made()
        if self._accumulates:
            return loss, _negate(made)
        pairs = [(x, q) for x, q in zip(g, made, strict=True) if x is not None and q is not None]
        subtract_(local(x for x, _ in pairs), local(q for _, q in pairs))
        alone = [q if x is None else None for x, q in zip(g, made, strict=True)]
        minus = _negate(_copied(alone))
        return loss, [m if x is None else x for x, m in zip(g, minus, strict=True)]

    def _call(self, grads: Grads) -> Tensor:
        """Runs the closure on these gradients and on what the first pass found of all else."""
        for param, grad in zip_longest(self._held, grads):
            param.grad = grad
        if self._rng is not None:
            self._rng.restore()
        self._buffers.restore()
        # The cache would serve casts of the weights as they were before the last change.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            loss = self._closure()
        self._returned: Any = loss
        insist_on_gradients("harmful_closure", self._trained)
        return loss_of(loss)

    def _strangers(self) -> list[Tensor]:
        ours = {*self._params}
        found = [x for x in _leaves(self._returned) if x not in ours and x.grad is not None]
        # Activations that require a gradient, as under PEFT, are leaves too, of one pass.
        return [x for x in found if isinstance(x, nn.Parameter)]

    def _made(self) -> Grads:
        return [None if p.grad is None else placed_like(p.grad, p) for p in self._params]


_CHANGED_WEIGHTS = (
    "The harmful pass changed weights: some optimizer or hook steps within the backward pass, and "
    "would train the model towards harm. Use one that steps in step()."
)
_NOT_ACCUMULATED = (
    "harmful_closure zeroed or edited .grad, though accumulates=True promises that it only adds "
    "to it. Zero no gradients in it, or leave accumulates=False."
)


def loss_of(returned: Any) -> Tensor:
    """What a harmful closure returned, as a detached tensor without dimensions.

    Raises:
        TypeError: It is no number.
        ValueError: It is not one real number.
    """
    if not isinstance(returned, Tensor):
        if isinstance(returned, bool) or not isinstance(returned, Real):
            raise TypeError(
                f"harmful_closure must return its loss, got {shown(returned)}. End it with "
                "`return loss`."
            )
        return torch.tensor(as_float(returned))
    if returned.numel() != 1 or returned.is_complex() or returned.dtype is torch.bool:
        raise ValueError(
            f"harmful_closure must return a real scalar loss, got a tensor of shape "
            f"{tuple(returned.shape)} and {returned.dtype}. Return loss.mean() or loss.sum()."
        )
    return returned.detach().clone().reshape(())


def _copied(grads: Grads) -> Grads:
    return filled(grads, copies([g for g in grads if g is not None]))


def _negate(grads: Grads) -> Grads:
    present = local(g for g in grads if g is not None)
    scale_(present, [-1.0] * len(present))
    return grads


def _length(grads: Grads) -> float:
    parts = [x.item() for x in norms(local(g for g in grads if g is not None))]
    return math.hypot(*parts)


class Waiting:
    """The regulariser that waits in `.grad`, watched at one parameter until a gradient joins it.

    Args:
        params: Parameters whose `.grad` holds it; none, where λ is zero for all that h reaches.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.lost = False
        self._param = next((p for p in params if p.grad is not None), None)
        if self._param is not None:
            self._grad: Any = weakref.ref(self._param.grad)  # pyright: ignore[reportArgumentType]
            self._hook = self._param.register_post_accumulate_grad_hook(self._joined)

    def _joined(self, param: Tensor) -> None:
        """Autograd adds to a gradient in place: another tensor means that this one was dropped."""
        if self._grad is not None:
            self.lost = param.grad is not self._grad()
            self._grad = None

    def is_there(self) -> bool:
        """Whether `.grad` still holds it, as far as one parameter tells."""
        return not self.lost and self._param is not None and self._param.grad is not None

    def end(self) -> None:
        """Stops watching."""
        if self._param is not None:
            self._hook.remove()

    def anew(self) -> Waiting:
        """Watches what is in `.grad` by now."""
        self.end()
        return Waiting([] if self._param is None else [self._param])


def add_scaled(params: Sequence[Tensor], grads: Grads, factors: Sequence[float]) -> list[Tensor]:
    """Adds gradients, times a number each, to `.grad`; where the number is 0, nothing.

    Args:
        params: The parameters.
        grads: What to add, aligned with `params`; scaled in place and, where a parameter has no
            `.grad`, put there.
        factors: One finite number for each.

    Returns:
        The parameters that got something.
    """
    rows = [
        (p, d, factor)
        for p, d, factor in zip(params, grads, factors, strict=True)
        if d is not None and factor
    ]
    scale_(local(d for _, d, _ in rows), [factor for *_, factor in rows])
    onto = [(p, d) for p, d, _ in rows if p.grad is not None]
    for p, d, _ in rows:
        p.grad = d if p.grad is None else placed_like(p.grad, p)
    add_(local(p.grad for p, _ in onto if p.grad is not None), local(d for _, d in onto))
    return [p for p, *_ in rows]


@contextmanager
def set_aside(params: Sequence[Tensor]) -> Generator[Sequence[Tensor]]:
    """Context of an empty `.grad`, to which what was there before is added at the end."""
    with torch.no_grad():
        # Copies: data parallelism may keep the tensors themselves, and write to them.
        kept = _copied([p.grad for p in params])
    for param in params:
        param.grad = None
    try:
        yield params
    finally:
        with torch.no_grad():
            add_scaled(params, kept, [1.0] * len(params))


@contextmanager
def _asking_gradients(params: Sequence[Tensor]) -> Generator[None]:
    """Context in which autograd makes gradients of weights that may be frozen."""
    # One call into C, between whose parts no handler of a signal can raise, as for the weights.
    restore = partial(list, map(Tensor.requires_grad_, params, [p.requires_grad for p in params]))
    try:
        for p in params:
            p.requires_grad_(True)
        yield
    finally:
        restore()


def insist_on_gradients(name: str, params: Sequence[Tensor]) -> None:
    """Raises where a closure made no gradient, or one that is sparse."""
    _refuse_sparse(name, params)
    if all(p.grad is None for p in params):
        raise RuntimeError(
            f"{name} made no gradients: no parameter of the optimizer has a .grad. Call "
            "loss.backward() in the closure, on a loss that depends on these parameters, and let "
            "FSDP2 reduce: not under set_requires_gradient_sync(False)."
        )


def _leaves(loss: Any) -> Iterator[Tensor]:
    """The leaf tensors that a loss was computed from, as far as its graph is at hand."""
    nodes: list[Any] = [getattr(loss, "grad_fn", None)]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if isinstance(getattr(node, "variable", None), Tensor):
                yield node.variable


def _refuse_sparse(name: str, params: Sequence[Tensor]) -> None:
    for param in params:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} made a gradient of layout {param.grad.layout}, but Booster's arithmetic "
                "is dense. Build the embedding with sparse=False."
            )


class RandomState:
    """State of every global generator: torch's on all devices, numpy's and Python's."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy: Any = sys.modules.get("numpy")  # where nobody has imported it, none draws
        if self._numpy is not None:
            self._drawn = self._numpy.random.get_state()
        self._module: Any = None
        if torch.accelerator.is_available():
            self._module = torch.get_device_module()
            many = hasattr(self._module, "get_rng_state_all")
            self._devices = self._module.get_rng_state_all() if many else None
            self._device = None if many else self._module.get_rng_state()

    def restore(self) -> None:
        """Puts every generator back."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            self._numpy.random.set_state(self._drawn)
        if self._module is not None and self._devices is not None:
            self._module.set_rng_state_all(self._devices)
        elif self._module is not None:
            self._module.set_rng_state(self._device)


class Buffers:
    """A module's buffers, and the plain values beside them that say what is in them.

    A rotary embedding, for one, remembers in an int for what length its frequencies were made.

    Args:
        module: The module, if there is one.
        but: Buffers that somebody else moves and puts back.
    """

    def __init__(self, module: nn.Module | None, but: Collection[Tensor] = ()) -> None:
        self._saved = [
            (
                owner,
                {
                    name: (b, None if b is None or b in but else b.clone())
                    for name, b in owner._buffers.items()
                },
                {
                    name: value
                    for name, value in vars(owner).items()
                    if isinstance(value, _PLAIN_VALUES) and name != "training"
                },
            )
            for owner in (module.modules() if module is not None else ())
            if owner._buffers
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts buffers and values back, in place where their shape allows."""
        for owner, buffers, beside in self._saved:
            for buffer, value in buffers.values():
                if buffer is not None and value is not None:
                    if buffer.shape != value.shape:  # an observer's, which grew with the batch
                        buffer.resize_(value.shape)
                    buffer.copy_(value)
            owner._buffers.clear()
            owner._buffers.update({name: buffer for name, (buffer, _) in buffers.items()})
            vars(owner).update(beside)


_PLAIN_VALUES = (bool, int, float, str, type(None), Tensor)
