"""A training stage, alignment or fine-tuning, as the way it makes the gradient of one step.

The loop around it is the same for all methods: zero the gradients, `stage.backward`, clip, step
`stage.optimizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

# Each with input_ids, attention_mask and labels, all of shape (batch, tokens); labels are −100 on
# the prompt and the padding.
Batches = Iterator[dict[str, Tensor]]


def backpropagate(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Adds the gradient of the model's loss on `batch` to `.grad`; returns the detached loss."""
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


class Stage(ABC):
    """How one training stage makes the gradient of a step.

    Subclasses take their hyperparameters as keyword-only arguments, whose defaults are the paper's.

    Args:
        model: A causal language model of transformers, with or without a PEFT adapter.
        optimizer: Steps the parameters of `model` that require a gradient.
    """

    optimizer: Optimizer  # what the loop zeroes and steps

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    @abstractmethod
    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """Adds the gradient of this step to `.grad` and leaves the weights as they are.

        Args:
            batches: Alignment stage: harmful prompts with refusals. Fine-tuning stage: the user's
                data.
            auxiliary: Alignment stage: harmful prompts with harmful answers. Fine-tuning stage:
                alignment data.

        Returns:
            The detached cross-entropy of the batch that is learned. Terms that a method adds to it
            are not in it, so that the losses of all methods compare.
        """

    def diagnostics(self) -> dict[str, float]:
        """What the last step saw beside its loss."""
        return {}

    def trainable(self) -> list[Tensor]:
        """The parameters that require a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]
