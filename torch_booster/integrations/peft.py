"""The weights into which PEFT's adapters will be merged, for a step that is simulated in them.

    optimizer = BoosterOptimizer(base, ..., perturbed=merged_weights(model))

Who aligns with LoRA and merges hands out other weights than those that trained. An attack moves
the merged ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torch_booster.integrations import needs

with needs("peft"):
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["merged_weights"]


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
    weights = [_weight(m) for m in model.modules() if isinstance(m, BaseTunerLayer) and _active(m)]
    if not weights:
        raise ValueError(
            "The model has no layer with an active adapter, so that nothing will be merged. Pass "
            "what get_peft_model returned, with LoRA or another adapter of layers."
        )
    return list(dict.fromkeys(weights))


def _active(layer: Any) -> bool:
    held = [getattr(layer, name, {}) for name in layer.adapter_layer_names]
    return any(adapter in of for of in held for adapter in layer.active_adapters)


def _weight(layer: Any) -> Tensor:
    if layer.merged:
        raise ValueError(
            f"An adapter has been merged into {type(layer).__name__} already. Call "
            "model.unmerge_adapter() before."
        )
    base = layer.get_base_layer()
    weight = layer.get_param() if hasattr(layer, "get_param") else getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"{type(layer).__name__} adapts a {type(base).__name__}, of which it is not known what "
            "will be merged. Pass BoosterOptimizer(..., perturbed=[...]) its weights yourself."
        )
    return weight
