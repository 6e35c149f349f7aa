"""The stages of a Booster step on the optimizer that Accelerate's `prepare` returned.

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

Prepare the alignment loader and not the harmful one, whose end Accelerate would take for the end
of the epoch; give each process its own part of it.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from torch_booster.closure import Closure
from torch_booster.engine import is_boundary, wrapped_by
from torch_booster.optimizer import BoosterOptimizer

__all__ = ["regularize"]


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
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = BoosterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> def harmful_closure():
        ...     loss = model(torch.ones(2, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> regularize(optimizer, harmful_closure).shape
        torch.Size([])
    """
    booster = wrapped_by(optimizer, BoosterOptimizer)
    if booster is None:
        raise TypeError(
            f"There is no BoosterOptimizer in {optimizer!r}. Wrap the optimizer before or after "
            "accelerator.prepare: BoosterOptimizer(AdamW(model.parameters()))."
        )
    return booster.regularize(harmful_closure) if is_boundary() else None
