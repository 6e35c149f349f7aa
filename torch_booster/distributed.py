"""The one place that knows about sharded tensors and process groups."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_booster.functional import root_sum_square

__all__ = ["global_norm", "local", "placed_like"]


def local(tensor: Tensor) -> Tensor:
    """This rank's dense, real view of a tensor: the shard of a DTensor, re and im of a complex one.

    Args:
        tensor: Parameter or gradient of any kind.

    Returns:
        A plain tensor on the same storage.
    """
    if _is_dtensor(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


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


def global_norm(norms: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """One L2 norm over all tensors on all ranks, from the norm of each local tensor.

    Norms of shards are summed, √(Σ‖shard‖²), over the mesh dimensions that shard the parameter,
    once for each combination of mesh and placements, so that plain, replicated and sharded
    parameters mix.

    Args:
        norms: 0-dimensional tensors, the norm of each local tensor. May be empty.
        params: The parameters they belong to, plain tensors or DTensors.

    Returns:
        A 0-dimensional tensor, equal on every rank.

    Example:
        >>> global_norm([torch.tensor(3.0), torch.tensor(4.0)], [torch.ones(1), torch.ones(2)])
        tensor(5.)
    """
    shares: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for norm, param in zip(norms, params, strict=True):
        shares[_shard_groups(param)].append(norm)
    return root_sum_square(
        [_over_ranks(root_sum_square(s), groups) for groups, s in shares.items()]
    )


def _over_ranks(norm: Tensor, groups: Sequence[Any]) -> Tensor:
    for group in groups:
        square = norm.square()
        torch.distributed.all_reduce(square, group=group)
        norm = square.sqrt()
    return norm


def _shard_groups(param: Tensor) -> tuple[Any, ...]:
    """Process groups over which the squares of this parameter's shards have to be summed."""
    if not _is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, place in enumerate(placements) if place.is_shard())


def _is_dtensor(tensor: Tensor) -> bool:
    # Where nobody has imported DTensor there are none, and the import would cost time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
