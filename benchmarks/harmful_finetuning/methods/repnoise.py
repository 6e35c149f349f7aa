"""RepNoise: pushes what the layers represent of harmful answers towards noise.

With f the cross-entropy of the refusals, a_l the output of layer l's MLP on a harmful batch and h_l
the residual stream after layer l (l = 0: the embeddings), both on the same batch,

    L = f + β·mean_l MMD(a_l, N(0, I)) − α·log(mean_l CE(head(norm(h_l))) + 1).

MMD compares the examples of the batch, each its answer's activations in one row of tokens × width,
with as many Gaussian rows. It is the biased estimate of the squared maximum mean discrepancy with a
sum of five Gaussian kernels exp(−d²/b), b = mean d² × (1/4, 1/2, 1, 2, 4), where the mean is over
all pairs of rows, and b is a constant of the backward pass. The formula leaves kernel and
bandwidths open; these are those of the authors' code.

Source: Rosati et al., "Representation Noising: A Defence Mechanism Against Harmful Finetuning",
NeurIPS 2024, arXiv 2405.14577, and its code, domenicrosati/representation-noising. The defaults
α = 0.1 and β = 0.001 are those of the Booster paper's comparison.

Where this differs from the authors' code:

- The answer's tokens are those with a label. The code takes the positions at which the ids of a
  harmful and a harmless text differ, which needs the two in pairs with equal prompts, and drops
  tokens that happen to agree.
- Each layer counts once, normalised once. The code adds the last layer a second time, through the
  logits, and normalises it twice there, since transformers returns its state normalised.
- Gemma 2's cap on the logits applies to every layer's, as it does to the model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harmful_finetuning.methods.layers import forward_hooks, submodules
from benchmarks.harmful_finetuning.methods.stage import Batches, Stage, backpropagate


class RepNoise(Stage):
    """Trains on `batches` with the noise and ascent terms of a harmful batch.

    The Gaussian rows come from torch's global generator.

    Args:
        model: See `Stage`.
        optimizer: See `Stage`.
        alpha: α ≥ 0, weight of the ascent on the harmful answers' cross-entropy.
        beta: β ≥ 0, weight of the noise term. α = β = 0 is SFT.

    Raises:
        ValueError: The model has no MLPs to read.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, alpha: float = 0.1, beta: float = 0.001
    ) -> None:
        super().__init__(model, optimizer)
        self.alpha = alpha
        self.beta = beta
        self.mlps = submodules(model, "mlp")
        self.terms: dict[str, Tensor] = {}

    def backward(self, batches: Batches, auxiliary: Batches) -> Tensor:
        """Makes g = ∇L(w), the terms of the harmful batch first. Returns f."""
        noise, harmful_loss = self.harmful_terms(next(auxiliary))
        (self.beta * noise - self.alpha * torch.log(harmful_loss + 1)).backward()
        self.terms = {"noise": noise.detach(), "harmful_loss": harmful_loss.detach()}
        return backpropagate(self.model, next(batches))

    def harmful_terms(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """mean_l MMD(a_l, N(0, I)) and mean_l CE(head(norm(h_l)))."""
        a: list[Tensor] = []
        with forward_hooks(self.mlps, lambda _, __, output: a.append(output)):
            outputs = self.model(**batch, output_hidden_states=True)
        answer = (batch["labels"] != -100).unsqueeze(-1)
        noise = [mmd((a_l * answer).flatten(1), gaussian(a_l, answer).flatten(1)) for a_l in a]

        norm = self.model.get_decoder().norm
        *inner, last = outputs.hidden_states  # the last one is normalised already
        losses = [self.cross_entropy(h, batch["labels"]) for h in (*map(norm, inner), last)]
        return torch.stack(noise).mean(), torch.stack(losses).mean()

    def cross_entropy(self, normalised: Tensor, labels: Tensor) -> Tensor:
        """The model's own loss, were `normalised` what the head is given."""
        logits = self.model.get_output_embeddings()(normalised)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return self.model.loss_function(logits, labels, vocab_size=logits.shape[-1])

    def diagnostics(self) -> dict[str, float]:
        """Both means of the last harmful batch, as `noise` and `harmful_loss`."""
        return {name: term.item() for name, term in self.terms.items()}


def gaussian(like: Tensor, mask: Tensor) -> Tensor:
    """N(0, I) where the mask is set and zero elsewhere, as the activations are."""
    return torch.randn_like(like) * mask


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """The biased squared maximum mean discrepancy between the rows of x and of y, both (n, d)."""
    rows = torch.cat([x, y])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    d2 = torch.cdist(rows, rows).square()
    mean = d2.detach().sum() / (len(rows) * (len(rows) - 1))
    kernel = torch.stack([torch.exp(-d2 / (mean * 2.0**i)) for i in range(-2, 3)]).sum(0)
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
