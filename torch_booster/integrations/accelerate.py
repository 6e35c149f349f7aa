"""The stages of a Booster step in Accelerate's hands, whichever way round the optimizer is wrapped.

Both orders work, and both take the same calls:

    model, optimizer = accelerator.prepare(model, BoosterOptimizer(AdamW(model.parameters())))
    optimizer = BoosterOptimizer(accelerator.prepare(AdamW(model.parameters())))

    for batch, harmful_batch in zip(loader, harmful_loader):
        with accelerator.accumulate(model):
            regularize(optimizer, harmful_closure)      # on the micro-batch that steps
            accelerator.backward(alignment_loss(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

or, in one call in the place of three, `step(optimizer, alignment_closure, harmful_closure)`.

Prepare the alignment loader and not the harmful one, whose end Accelerate would take for the end
of the epoch; give each process its own part of it.

Under DeepSpeed the optimizer is prepared bare, and what follows goes around its engine:

    model, optimizer = accelerator.prepare(model, AdamW(model.parameters()))
    booster = AcceleratedEngine(accelerator, lam=5.0, alpha=0.1)

In the loop `booster.regularize(harmful_closure)` takes the place of `regularize`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_booster.checks import NO_DEEPSPEED, checked_closure, layers
from torch_booster.closure import Closure
from torch_booster.integrations import needs
from torch_booster.integrations.deepspeed import BoosterEngine
from torch_booster.optimizer import BoosterOptimizer

with needs("accelerate"):
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
    from accelerate.state import (  # pyright: ignore[reportMissingTypeStubs]
        AcceleratorState,
        GradientState,
    )
    from accelerate.utils import DistributedType  # pyright: ignore[reportMissingTypeStubs]
    from accelerate.utils.deepspeed import (  # pyright: ignore[reportMissingTypeStubs]
        DeepSpeedEngineWrapper,
    )

__all__ = ["AcceleratedEngine", "booster_of", "regularize", "step"]

# Of a BoosterOptimizer, and of no optimizer around it.
HYPERPARAMETERS = {
    *("lam", "alpha", "every", "norm", "perturbed", "lam_warmup_steps", "lam_delay_steps"),
    "trust_region",
}


def regularize(optimizer: Optimizer, harmful_closure: Closure) -> Tensor | None:
    """Adds λ·(∇h(w) − ∇h(w′)) to `.grad` on the micro-batch that steps, and else does nothing.

    As the `step` and `zero_grad` of a prepared optimizer do, so that the loop needs no condition.
    λ is not divided by the accumulation steps, though `accelerator.backward` divides each loss.

    Args:
        optimizer: What `accelerator.prepare` made of a BoosterOptimizer, or a BoosterOptimizer.
        harmful_closure: Runs forward and backward of h, by `accelerator.backward` wherever the
            precision is fp16, and returns the loss. Called twice, on one batch. It may loop over
            micro-batches, taking their mean itself, and must not enter `accelerator.accumulate`.

    Returns:
        h(w), detached; None where nothing was run, off the boundary or with λ = 0.

    Raises:
        TypeError: There is no BoosterOptimizer in `optimizer`.
        RuntimeError: The engine cannot be served (DeepSpeed, or FSDP without `sync_each_batch`),
            the closure made no gradients, or the regulariser has been added already.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> def harmful_closure():
        ...     loss = model(torch.ones(2, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> regularize(optimizer, harmful_closure).shape
        torch.Size([])
    """
    booster = booster_of(optimizer)
    harmful_closure = checked_closure("harmful_closure", harmful_closure)
    if not GradientState().sync_gradients or not booster.is_due():
        return None
    _refuse_what_cannot_work()
    return booster._regularize(_undivided(harmful_closure), loss_scale(booster, optimizer))


def step(optimizer: Optimizer, alignment_closure: Closure, harmful_closure: Closure) -> Any:
    """One Booster step in one call: off the micro-batch that steps, the alignment pass alone.

    Args:
        optimizer: What `accelerator.prepare` made of a BoosterOptimizer, or a BoosterOptimizer.
        alignment_closure: Runs forward and backward (`accelerator.backward`) of a micro-batch.
        harmful_closure: As `regularize` takes it.

    Returns:
        What `alignment_closure` returned.
    """
    booster = booster_of(optimizer)
    alignment_closure = checked_closure("alignment_closure", alignment_closure)
    harmful_closure = checked_closure("harmful_closure", harmful_closure)
    if GradientState().sync_gradients and booster.is_due():
        _refuse_what_cannot_work()
        scale = loss_scale(booster, optimizer)
        loss = booster._backward(alignment_closure, _undivided(harmful_closure), scale)
    else:
        with torch.enable_grad():
            loss = alignment_closure()
    optimizer.step()
    return loss


def loss_scale(booster: BoosterOptimizer, prepared: Any) -> float:
    """By which `accelerator.backward` makes gradients larger than the loss; for a trust region."""
    if booster.trust_region:
        for layer in (*layers(prepared), *layers(booster.base_optimizer)):
            if (scaler := getattr(layer, "scaler", None)) is not None:
                return scaler.get_scale()
    return 1.0


class AcceleratedEngine(BoosterEngine, DeepSpeedEngineWrapper):
    """`BoosterEngine` around the DeepSpeed engine that Accelerate has prepared.

    Accelerate runs every backward pass by `accelerator.deepspeed_engine_wrapped`, which also takes
    the engine's step, after the micro-batch at which gradients are synchronised. This object takes
    its place: there it steps on the Booster gradient, and it does not step after a harmful pass.

        model, optimizer, loader = accelerator.prepare(model, AdamW(model.parameters()), loader)
        booster = AcceleratedEngine(accelerator, lam=5.0, alpha=0.1)

        for batch, harmful_batch in zip(loader, harmful_loader):
            with accelerator.accumulate(model):
                booster.regularize(harmful_closure)      # on the first micro-batch of a step
                accelerator.backward(alignment_loss(model, batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    Args:
        accelerator: It has prepared the model, with an optimizer that is no `BoosterOptimizer`.
        lam: As `BoosterEngine` takes it, and so are all that follow.
        alpha: The same.
        norm: The same.
        lam_warmup_steps: The same.
        lam_delay_steps: The same.
        every: The same.
        eps: The same.
        trust_region: The same.
        replay_rng: The same.
        self_check: The same.

    Attributes:
        begins: Whether the coming micro-batch is the first of a step.

    Raises:
        TypeError: The engine, its wrapper or its optimizer is of a class that is not supported.
        ValueError: A hyperparameter is out of its range.
        RuntimeError: There is no engine yet, or a feature that is not supported is switched on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        lam: float = 5.0,
        alpha: float = 0.1,
        *,
        norm: Literal["global", "tensor"] = "global",
        lam_warmup_steps: int = 0,
        lam_delay_steps: int = 0,
        every: int = 1,
        eps: float = 1e-7,
        trust_region: bool = False,
        replay_rng: bool = True,
        self_check: bool = True,
    ) -> None:
        wrapped: Any = getattr(accelerator, "deepspeed_engine_wrapped", None)
        if wrapped is None:
            raise RuntimeError(
                "The accelerator has no DeepSpeed engine. Prepare the model and its optimizer "
                "first; without DeepSpeed wrap the optimizer in a BoosterOptimizer. A Trainer has "
                "none in its second train(), with Booster or without: make another trainer."
            )
        if type(wrapped).__name__ not in ("DeepSpeedEngineWrapper", "AcceleratedEngine"):
            raise TypeError(
                f"accelerator.deepspeed_engine_wrapped is a {type(wrapped).__name__}, whose place "
                "AcceleratedEngine can not take. Leave Accelerate's DeepSpeedEngineWrapper."
            )
        super().__init__(
            wrapped.engine,
            lam,
            alpha,
            norm=norm,
            lam_warmup_steps=lam_warmup_steps,
            lam_delay_steps=lam_delay_steps,
            every=every,
            eps=eps,
            trust_region=trust_region,
            replay_rng=replay_rng,
            self_check=self_check,
        )
        self.begins = True
        self._in_harmful_pass = False
        accelerator.deepspeed_engine_wrapped = self

    def regularize(self, harmful_closure: Closure) -> Tensor | None:
        """Runs the harmful passes, before the first micro-batch of a step, and else nothing.

        Args:
            harmful_closure: Runs one forward pass of h through the prepared model and one
                `accelerator.backward(loss)`, and returns the loss. Called twice, on one batch.

        Returns:
            h(w), averaged over the ranks; None where nothing was run.

        Raises:
            TypeError: `harmful_closure` is not callable or returns no loss.
            RuntimeError: It ran no backward pass or several, or the last step was not taken by
                this object.
        """
        return super().regularize(harmful_closure) if self.begins else None

    def _regularize(self, h: Closure) -> Tensor | None:
        self._in_harmful_pass = True
        try:
            return super()._regularize(h)
        finally:
            self._in_harmful_pass = False

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Runs the backward pass for `accelerator.backward`, and the step where it is due.

        Args:
            loss: The loss of a micro-batch.
            sync_gradients: The micro-batch is the last of a step.
            **kwargs: For `engine.backward`.
        """
        if self._in_harmful_pass:
            self.engine.backward(loss, **kwargs)
            return
        self.begins = False
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        try:
            self.engine.backward(loss, **kwargs)
            if sync_gradients:
                self.step()
        finally:
            self.begins = sync_gradients


def booster_of(optimizer: Optimizer) -> BoosterOptimizer:
    """The BoosterOptimizer that an optimizer is, or wraps: its `lam`, `alpha` and `diagnostics`.

    What `accelerator.prepare` returns passes none of them on, so that after it

        booster_of(optimizer).lam = 0.05
        booster_of(optimizer).read_diagnostics()

    stand for `optimizer.lam = 0.05` and `optimizer.read_diagnostics()`.

    Raises:
        TypeError: There is none.
        RuntimeError: One of its hyperparameters was set on a wrapper, where it does nothing.
    """
    for layer in layers(optimizer):
        if isinstance(layer, BoosterOptimizer):
            return layer
        accelerates = hasattr(layer, "gradient_state")  # others have an alpha of their own
        for name in HYPERPARAMETERS & vars(layer).keys() if accelerates else ():
            raise RuntimeError(
                f"{name} was set on the {type(layer).__name__} around the BoosterOptimizer, where "
                f"it does nothing. Set booster_of(optimizer).{name}, with booster_of from "
                f"torch_booster.integrations.accelerate, and del optimizer.{name}."
            )
    raise TypeError(
        f"There is no BoosterOptimizer in the {type(optimizer).__name__}. Wrap the optimizer "
        "before or after accelerator.prepare: BoosterOptimizer(AdamW(model.parameters()))."
    )


def _undivided(harmful_closure: Closure) -> Closure:
    """A closure in which `accelerator.backward` does not divide by the accumulation steps.

    The regulariser enters a step once, whatever the number of micro-batches: divided, λ would
    silently become λ/accumulation steps.
    """

    def closure() -> Tensor | float:
        with _one_step():
            return harmful_closure()

    return closure


@contextmanager
def _one_step() -> Generator[None]:
    state = GradientState()
    kept = state.plugin_kwargs
    state.plugin_kwargs = {**kept, "num_steps": 1}
    try:
        yield
    finally:
        state.plugin_kwargs = kept


def _refuse_what_cannot_work() -> None:
    engine = AcceleratorState._shared_state.get("distributed_type")
    if engine == DistributedType.DEEPSPEED:
        raise RuntimeError(NO_DEEPSPEED)
    accumulation = GradientState().plugin_kwargs
    if (
        engine == DistributedType.FSDP
        and accumulation.get("num_steps", 1) > 1
        and not accumulation.get("sync_each_batch", False)
    ):
        raise RuntimeError(
            "FSDP keeps the gradients of earlier micro-batches unreduced, and the harmful passes "
            "would reduce them along with their own. Reduce each micro-batch: Accelerator("
            "gradient_accumulation_plugin=GradientAccumulationPlugin("
            f"num_steps={accumulation['num_steps']}, sync_each_batch=True))."
        )
