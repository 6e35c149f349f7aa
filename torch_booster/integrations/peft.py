"""The weights into which PEFT's adapters will be merged, for a step that is simulated in them.

    optimizer = BoosterOptimizer(base, ..., perturbed=MergedOffsets(model))

Who aligns with LoRA and merges hands out other weights than those that trained. An attack moves
the merged ones. `merged_weights` are these weights themselves. Where they, or the passes, have
fewer than 32 bits, much of so short a step would be rounded away: there `MergedOffsets` keeps it
apart from them.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_booster.checks import is_plain, is_sharded
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

    $$ y = x\,(W + \delta)^\top = x\,W^\top + x\,\delta^\top $$

    δ is zero except at w′, and the gradient by δ is the one by W. A δ that starts at zero keeps its
    digits in bfloat16, where W − α·g/‖g‖ is W again for most elements: no element of the step is
    lost for being shorter than 2⁻⁸ of its weight.
    Under autocast the two terms are added in float32. W itself is not touched and needs no
    gradient, so that it may be quantised. Where a pass disables the adapters or changes them, as
    for the reference model of DPO, it sees no δ.

    The second product is made in the harmful passes alone. Memory: three tensors like each W in
    δ's dtype, and autocast's copy of δ where that is wider.

    Args:
        model: A model with LoRA on linear layers or embeddings, on any device.
        dtype: Of δ; by default that of each W, and bfloat16 where W is quantised.

    Raises:
        ValueError: There is no such layer, an adapter has been merged already, a layer or its
            adapter is of a kind for which this is no such sum (DoRA, IA³), or a weight is sharded
            or also serves another layer (tied embeddings).

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
        self._beside: list[_Beside] = []
        self._told: set[str] = set()
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
        narrow = any(p.itemsize < 4 for m in norms for p in m.parameters(recurse=False))
        held = (p for m in model.modules() for p in m.parameters(recurse=False))
        holders = Counter(map(id, held))
        for layer in _adapted(model):
            base = _refuse_merged(layer).get_base_layer()
            product = _product(layer, base)
            w = base.weight
            if is_sharded(w):
                raise ValueError(
                    f"The weight of a {type(base).__name__} is sharded (FSDP, tensor parallel), of "
                    "which the whole gradient is needed. Use DDP."
                )
            if holders[id(w)] > 1:
                raise ValueError(
                    f"The weight of a {type(base).__name__} that LoRA adapts also serves another "
                    "layer (tied embeddings), whose outputs the merged weight changes too. Adapt "
                    "other layers, or, in float32 without autocast, pass merged_weights."
                )
            shape = w.shape if is_plain(w) else (layer.out_features, layer.in_features)
            kind = dtype or (w.dtype if is_plain(w) else torch.bfloat16)
            offset = torch.zeros(shape, dtype=kind, device=w.device)
            adapters = [*layer.active_adapters]
            self._beside.append(_Beside(layer, base, adapters, offset, product, narrow, self._told))
        self._keys = [object() for _ in self._beside]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([beside.offset for beside in self._beside])

    def __len__(self) -> int:
        return len(self._beside)

    def __contains__(self, weight: object) -> bool:
        return any(weight is offset for offset in self)

    def __enter__(self) -> None:
        for beside in self._beside:
            device = beside.base.weight.device
            if beside.offset.device != device:  # the model has been moved since
                beside.offset.data = beside.offset.data.to(device)
        self._unhook()  # Ctrl-C may have left some
        hooks = self._hooks()
        try:
            # As register_forward_hook does, but for all layers in one call into C, between whose
            # parts no handler of a signal can raise; and before the hooks of others, which see the
            # merged layer's outputs.
            list(map(OrderedDict.__setitem__, hooks, self._keys, self._beside))
            list(map(OrderedDict.move_to_end, hooks, self._keys, repeat(False)))
        except BaseException:
            self._unhook()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        there = self._unhook()
        if kind is None and not there:
            raise RuntimeError(
                "MergedOffsets was entered twice: another regulariser ran within the harmful "
                "closure, or the offsets were entered by hand. Leave that to the optimizer."
            )

    def _hooks(self) -> list[Any]:
        return [beside.base._forward_hooks for beside in self._beside]

    def _unhook(self) -> bool:
        """Takes the hooks away, in one call into C too; returns whether all were there."""
        return all(list(map(OrderedDict.pop, self._hooks(), self._keys, repeat(None))))


_Product = Callable[[Tensor, Tensor], Tensor]


class _Beside(NamedTuple):
    """Adds x·δᵀ to what the base of an adapted layer returns."""

    layer: Any
    base: Any
    adapters: list[str]
    offset: Tensor
    product: _Product
    narrow_norms: bool
    told: set[str]

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if self.layer.disable_adapters or [*self.layer.active_adapters] != self.adapters:
            return None
        x = args[0]
        if torch.is_autocast_enabled(x.device.type):
            if self.narrow_norms and x.device.type == "cpu":
                raise RuntimeError(
                    "Under autocast a layer beside an offset returns float32, which on a CPU a "
                    "LayerNorm or GroupNorm in bfloat16 does not take. Load the base in float32."
                )
            # y has been rounded: in its dtype the sum would be y again.
            return y.float() + self.product(x, self.offset).float()
        if y.dtype.itemsize < 4 and "narrow" not in self.told:
            self.told.add("narrow")
            warnings.warn(
                f"The passes are in {y.dtype} throughout, in which about half of the simulated "
                "step is rounded away where it is added to what a layer returns. Run them under "
                "torch.autocast (bf16=True with a Trainer), whatever the dtype of the base.",
                stacklevel=2,
            )
        return y + self.product(x, self.offset.to(y.dtype)).to(y.dtype)


def _product(layer: Any, base: Any) -> _Product:
    """How the output of a layer's base depends on its weight."""
    if not isinstance(layer, LoraLayer) or any(
        adapter in layer.lora_variant for adapter in layer.active_adapters
    ):
        raise ValueError(
            f"The adapter of a {type(base).__name__} is none of plain LoRA but another or a "
            "variant such as DoRA, and a step in the merged weight can not be kept beside it. Use "
            "plain LoRA, or, in float32 without autocast, pass merged_weights."
        )
    if "forward" in vars(base) and not hasattr(base, "_hf_hook"):  # Accelerate's moves tensors
        raise ValueError(
            f"A {type(base).__name__} that LoRA adapts has a forward of its own, of which it is "
            "not known how it depends on the weight. Undo the patch, or, in float32 without "
            "autocast, pass merged_weights."
        )
    is_linear = isinstance(base, nn.Linear)
    if is_linear and (type(base).forward is nn.Linear.forward or not is_plain(base.weight)):
        return functional.linear
    if type(base) is Conv1D:
        return torch.matmul
    if type(base) is nn.Embedding and not base.scale_grad_by_freq and base.max_norm is None:
        return partial(functional.embedding, padding_idx=base.padding_idx)
    raise ValueError(
        f"LoRA adapts a {type(base).__name__}, of which it is not known how its output depends on "
        "its weight. MergedOffsets knows nn.Linear, also quantised, Conv1D and nn.Embedding. Adapt "
        "those, or, in float32 without autocast, pass merged_weights."
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
