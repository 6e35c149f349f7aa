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
        The `weight` of each layer under an active adapter, each once; frozen as PEFT leaves them.

    Raises:
        ValueError: There is no such layer.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"]))
        >>> [tuple(w.shape) for w in merged_weights(model)]
        [(8, 4), (2, 8)]
    """
    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer) and m.active_adapters
    ]
    weights = [layer.get_base_layer().weight for layer in layers]
    if not weights:
        raise ValueError(
            "The model has no layer with an active adapter, so that nothing will be merged. Pass "
            "what get_peft_model returned, with LoRA or another adapter of layers."
        )
    return list(dict.fromkeys(weights))
