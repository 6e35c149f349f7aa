"""The one place that knows about sharded tensors and process groups."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_booster.functional import copying, root_sum_square, zero_

__all__ = [
    "copies",
    "global_norm",
    "gradients_stay_local",
    "local",
    "placed_like",
    "several_processes",
    "version",
    "zeros",
]


_PLAIN = {Tensor, nn.Parameter}


def local(tensor: Tensor) -> Tensor:
    """This rank's dense, real view of a tensor: the shard of a DTensor, re and im of a complex one.

    A plain real tensor is its own view; write to it under `no_grad`.

    Args:
        tensor: Parameter or gradient of any kind.

    Returns:
        A plain tensor on the same storage.
    """
    if _is_plain(tensor):
        return tensor if not tensor.is_complex() else torch.view_as_real(tensor.detach())
    if _is_dtensor(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def zeros(like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the shape, dtype and placement of each tensor.

    Example:
        >>> zeros([torch.ones(2)])
        [tensor([0., 0.])]
    """
    made = [torch.empty_like(t, requires_grad=False) for t in like]
    zero_([local(m) for m in made])
    return made


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor, placed as it is.

    Example:
        >>> copies([torch.ones(2)])
        [tensor([1., 1.])]
    """
    made = [torch.empty_like(t, requires_grad=False) for t in tensors]
    copying([local(m) for m in made], [local(t) for t in tensors])()
    return made


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient with the placements of its parameter.

    Autograd may leave a partial sum in the `.grad` of a replicated DTensor; its local tensor is
    no gradient yet.

    Args:
        grad: Gradient of `param`.
        param: Plain tensor or DTensor.

    Returns:
        `grad` itself, where nothing has to move.
    """
    if _is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return grad


def version(grad: Tensor) -> int:
    """Counts in-place changes of a gradient, those of a DTensor's local tensor included.

    Args:
        grad: Gradient of any kind.

    Returns:
        A number that grows by at least one with each change.
    """
    if not _is_plain(grad) and _is_dtensor(grad):
        return grad._version + grad.to_local()._version  # type: ignore[attr-defined]
    return grad._version


def gradients_stay_local(params: Sequence[Tensor]) -> bool:
    """Whether gradients that nothing but autograd has written are one rank's alone.

    True in a run of several processes on plain parameters: data parallelism writes the averaged
    gradient back, which is more than an accumulation. DTensors are reduced within backward.

    Args:
        params: The trainable parameters.
    """
    return several_processes() and not any(_is_dtensor(p) for p in params)


def several_processes() -> bool:
    """Whether this is one rank of several in torch.distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


def global_norm(
    norms: Sequence[Tensor], params: Sequence[Tensor], module: nn.Module | None = None
) -> Tensor:
    """One L2 norm over all tensors on all ranks, from the norm of each local tensor.

    Norms of shards are summed, √(Σ‖shard‖²), over the process groups that shard the parameter,
    once for each kind of sharding, so that plain, replicated and sharded parameters mix.

    Args:
        norms: 0-dimensional tensors, the norm of each local tensor. May be empty.
        params: The parameters they belong to: plain tensors, DTensors or FSDP1's flat shards.
        module: The FullyShardedDataParallel module, which FSDP1's shards need.

    Returns:
        A 0-dimensional tensor, equal on every rank.

    Raises:
        RuntimeError: `params` holds shards of FSDP1 that are not found in `module`.

    Example:
        >>> global_norm([torch.tensor(3.0), torch.tensor(4.0)], [torch.ones(1), torch.ones(2)])
        tensor(5.)
    """
    flat_shards = _flat_shard_groups(params, module)
    shares: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for norm, param in zip(norms, params, strict=True):
        groups = flat_shards.get(param) if flat_shards else None
        shares[_mesh_groups(param) if groups is None else groups].append(norm)
    totals = [_over_ranks(root_sum_square(share), groups) for groups, share in shares.items()]
    return root_sum_square(totals)


def _over_ranks(norm: Tensor, groups: Sequence[Any]) -> Tensor:
    for group in groups:
        square = norm.square()
        torch.distributed.all_reduce(square, group=group)
        norm = square.sqrt()
    return norm


def _mesh_groups(param: Tensor) -> tuple[Any, ...]:
    """Process groups over which the squares of a DTensor's shards have to be summed."""
    if not _is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    # Shard and _StridedShard (of FSDP2 over tensor parallelism) have no common test of their own.
    sharded = (dim for dim, placement in enumerate(placements) if not placement.is_replicate())
    return tuple(mesh.get_group(dim) for dim in sharded)


def _flat_shard_groups(
    params: Sequence[Tensor], module: nn.Module | None
) -> dict[Tensor, tuple[Any, ...]]:
    """The same for FSDP1, whose parameters are plain tensors that only their module can place."""
    flat = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    if not flat:
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    groups: dict[Tensor, tuple[Any, ...]] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(module) if module is not None else ():
        handle: Any = unit._handle
        if handle is not None:
            shards = (handle.process_group,) if handle.uses_sharded_strategy else ()
            for param in (handle.flat_param, *(handle.flat_param._params or ())):
                groups[param] = shards
    if any(p not in groups for p in flat):
        raise RuntimeError(
            "The parameters are shards of FullyShardedDataParallel (FSDP1), whose norm needs "
            "their process group. Pass the wrapped model: BoosterOptimizer(..., module=model)."
        )
    return groups


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN


def _is_dtensor(tensor: Tensor) -> bool:
    # Where nobody has imported DTensor there are none, and the import would cost time.
    module = None if _is_plain(tensor) else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
