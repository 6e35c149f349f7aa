"""A comparison for Booster: the exact gradient of what Booster minimises.

    g = ∇[f(w) + λ·(h(w) − h(w′))],    w′ = w − α·∇h(w)/(‖∇h(w)‖ + 1e-7),

where w′ is differentiated as a function of w. Booster takes ∂w′/∂w = I instead, passing the
gradient at w′ straight through. What it leaves out is α·(∂s/∂w)ᵀ·∇h(w′) with the normalised
gradient s: a product with the Hessian of h, of order α² where the regulariser itself is of order α.

For tiny models only. Three forward passes a step as in Booster, but the graph of the first harmful
pass and that of its backward pass are held until both have been differentiated again, and
attention runs in torch's plain kernel, which holds matrices of tokens by tokens. A step takes about
1.6 times as long as Booster's at preset `small` on a CPU.

Not from the paper; λ = 5 and α = 0.1 are Booster's. Written out here, without `torch_booster`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.linalg import vector_norm
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harmful_finetuning.methods.perturbed import Regularized


class SecondOrder(Regularized):
    """Trains on `batches` with the regulariser of a harmful batch, differentiated exactly.

    The weights are never changed in place. Dropout masks are those of the first harmful pass in
    the second too, as in Booster.

    The model's attention must be eager or torch's `scaled_dot_product_attention`.
    """

    def regularize(self, harmful: dict[str, Tensor]) -> None:
        """Adds λ·∇[h(w) − h(w′)] to `.grad`."""
        w = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            with torch.random.fork_rng():
                h = self.model(**harmful).loss
            g = torch.autograd.grad(
                h, list(w.values()), create_graph=True, materialize_grads=True, allow_unused=True
            )
            # Not `get_total_norm`, which detaches.
            norm = vector_norm(torch.stack([vector_norm(g_p) for g_p in g]))
            w_prime = {
                name: p - self.alpha * g_p / (norm + 1e-7)
                for (name, p), g_p in zip(w.items(), g, strict=True)
            }
            h_prime = functional_call(self.model, w_prime, args=(), kwargs=harmful).loss
            (self.lam * (h - h_prime)).backward()

        self.see(h.detach(), h_prime.detach(), norm.detach())
