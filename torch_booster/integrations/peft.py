"""The weights into which PEFT's adapters will be merged, for a step that is simulated in them.

    optimizer = BoosterOptimizer(base, ..., perturbed=MergedOffsets(model))

Who aligns with LoRA and merges hands out other weights than those that trained. An attack moves
the merged ones. `merged_weights` are these weights themselves. Where they, or the passes, have
fewer than 32 bits, much of so short a step would be rounded away: there `MergedOffsets` keeps it
apart from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_booster.integrations import needs

with needs("peft"):
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

__all__ = ["MergedOffsets", "merged_weights"]


def merged_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the layers that active adapters change.

    Args:
        model: A model with an adapter of PEFT that changes layers (LoRA and the like).

    Returns:
        The weight of each layer that an active adapter changes, each once; frozen as PEFT leaves
        them.

    Raises:
        ValueError: There is no such layer, an adapter has been merged already, or a layer has no
            weight that autograd could reach (attention in one piece, packed quantisation).

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"]))
        >>> [tuple(w.shape) for w in merged_weights(model)]
        [(8, 4), (2, 8)]
    """
    return list(dict.fromkeys(_weight(layer) for layer in _adapted(model)))


class MergedOffsets:
    r"""What the simulated step adds to the weights that LoRA will be merged into, kept beside them.

    $$ y = x\,(W + \delta)^\top = x\,W^\top + x\,\delta^\top, \qquad \delta = 0
       \text{ except at } w' $$

    The gradient by δ is the one by W. A δ that starts at zero keeps its digits in any dtype, where
    W − α·g/‖g‖ in bfloat16 is W again for most elements: nothing is lost between 2⁻⁸ of a weight
    and the step. Under autocast the two terms are added in float32. W itself is not touched and
    needs no gradient, so that it may be quantised.

    The second product is made in the harmful passes alone. Memory: three tensors like each W in
    δ's dtype.

    Args:
        model: A model with LoRA on linear layers or embeddings, on any device.
        dtype: Of δ; by default that of each W, and bfloat16 where W is quantised.

    Raises:
        ValueError: There is no such layer, an adapter has been merged already, or a layer's
            adapter is none that is added (DoRA, IA³).

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch_booster import BoosterOptimizer
        >>> layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16()
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"]))
        >>> offsets = MergedOffsets(model)
        >>> opt = BoosterOptimizer(torch.optim.AdamW(model.parameters()), perturbed=offsets)
        >>> [(tuple(d.shape), d.dtype) for d in opt.perturbed]
        [((8, 4), torch.bfloat16), ((2, 8), torch.bfloat16)]

    Not from the paper.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._layers: dict[Any, tuple[Tensor, _Product]] = {}
        self._hooks: list[Any] = []
        for layer in _adapted(model):
            base, product = _refuse_merged(layer).get_base_layer(), _product(layer)
            w = base.weight
            plain = type(w) in (Tensor, nn.Parameter) and w.is_floating_point()
            shape = w.shape if plain else (layer.out_features, layer.in_features)
            kind = dtype or (w.dtype if plain else torch.bfloat16)
            self._layers[base] = torch.zeros(shape, dtype=kind, device=w.device), product

    def __iter__(self) -> Iterator[Tensor]:
        return iter([offset for offset, _ in self._layers.values()])

    def __enter__(self) -> None:
        for base, (offset, product) in self._layers.items():
            if offset.device != base.weight.device:  # the model has been moved since
                offset.data = offset.data.to(base.weight.device)
            hook = partial(_with_offset, offset, product)
            self._hooks.append(base.register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()


_Product = Callable[[Tensor, Tensor], Tensor]


def _with_offset(
    offset: Tensor, product: _Product, base: nn.Module, args: tuple[Tensor, ...], y: Tensor
) -> Tensor:
    """A layer's output with x·δᵀ added to it."""
    x = args[0]
    # At w δ is zero, and all that is asked of it is its gradient.
    delta = product(x, offset.to(x.dtype) if x.is_floating_point() else offset)
    if torch.is_autocast_enabled(x.device.type):
        return y.float() + delta.float()  # y has been rounded: in its dtype the sum would be y
    if y.dtype.itemsize < 4:
        warnings.warn(
            f"The passes are in {y.dtype} throughout, in which about half of the simulated step is "
            "rounded away where it is added to what a layer returns. Run them under torch.autocast "
            "(bf16=True with a Trainer), whatever the dtype of the base.",
            stacklevel=2,
        )
    return y + delta.to(y.dtype)


def _product(layer: Any) -> _Product:
    """How a layer's output depends on its weight."""
    base = layer.get_base_layer()
    if isinstance(layer, LoraLayer) and not layer.lora_variant:
        if isinstance(base, nn.Linear):
            return functional.linear
        if isinstance(base, Conv1D):
            return torch.matmul
        if type(base) is nn.Embedding:
            return partial(functional.embedding, padding_idx=base.padding_idx)
    raise ValueError(
        f"{type(layer).__name__} adapts a {type(base).__name__} by more than a sum of products, so "
        "that a step in the merged weight can not be kept beside it. Use plain LoRA on linear "
        "layers and embeddings, or, with a float32 base and without autocast, merged_weights."
    )


def _adapted(model: nn.Module) -> list[Any]:
    """The layers that an active adapter changes."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and _active(m)]
    if not layers:
        raise ValueError(
            "The model has no layer with an active adapter, so that nothing will be merged. Pass "
            "what get_peft_model returned, with LoRA or another adapter of layers."
        )
    return layers


def _refuse_merged(layer: Any) -> Any:
    if layer.merged:
        raise ValueError(
            f"An adapter has been merged into {type(layer).__name__} already. Call "
            "model.unmerge_adapter() before."
        )
    return layer


def _active(layer: Any) -> bool:
    held = [getattr(layer, name, {}) for name in layer.adapter_layer_names]
    return any(adapter in of for of in held for adapter in layer.active_adapters)


def _weight(layer: Any) -> Tensor:
    base = _refuse_merged(layer).get_base_layer()
    weight = layer.get_param() if hasattr(layer, "get_param") else getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"{type(layer).__name__} adapts a {type(base).__name__}, of which it is not known what "
            "will be merged. Pass BoosterOptimizer(..., perturbed=[...]) its weights yourself."
        )
    return weight
