"""The one place that knows about sharded tensors and process groups."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_booster.functional import copying, moved_to

__all__ = ["averaged", "copies", "local", "placed_like", "refuse_unequal", "tensor_norms"]


_PLAIN = {Tensor, nn.Parameter}


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's dense, real views: the shard of a DTensor, re and im of a complex tensor.

    A plain real tensor is its own view; write to it under `no_grad`.
    """
    return [t if type(t) in _PLAIN and not t.is_complex() else _local(t) for t in tensors]


def _local(tensor: Tensor) -> Tensor:
    if _is_dtensor(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor, placed as it is.

    Example:
        >>> copies([torch.ones(2)])
        [tensor([1., 1.])]
    """
    made = [torch.empty_like(t, requires_grad=False) for t in tensors]
    copying(local(made), local(tensors))()
    return made


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient with the placements of its parameter; itself, where nothing has to move.

    Autograd may leave a partial sum in the `.grad` of a replicated DTensor; its local tensor is
    no gradient yet.
    """
    if _is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return grad


def tensor_norms(
    norms: Sequence[Tensor | None], params: Sequence[Tensor], module: nn.Module | None = None
) -> Tensor:
    """The L2 norm of each whole tensor, from the norms of its shards on all ranks.

    Squares are summed over the process groups that shard a parameter, those of all parameters
    sharded alike in one collective, so that plain, replicated and sharded parameters mix.

    Args:
        norms: 0-dimensional tensors on any devices, the norm of each local tensor, or None where
            this rank has nothing of it.
        params: The parameters they belong to, the same on every rank: plain tensors, DTensors or
            FSDP1's flat shards.
        module: The FullyShardedDataParallel module, which FSDP1's shards need.

    Returns:
        A tensor of shape (tensors,) in the widest dtype present, equal on every rank.

    Raises:
        RuntimeError: `params` holds shards of FSDP1 that are not found in `module`.

    Example:
        >>> tensor_norms([torch.tensor(3.0), torch.tensor(4.0)], [torch.ones(1), torch.ones(2)])
        tensor([3., 4.])
    """
    flat_shards = _flat_shard_groups(params, module)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        groups = flat_shards.get(param) if flat_shards else None
        alike[_mesh_groups(param) if groups is None else groups].append(i)
    present = [n for n in norms if n is not None] or [torch.zeros(())]
    device, dtype = present[0].device, max((n.dtype for n in present), key=lambda d: d.itemsize)
    zero = torch.zeros((), device=device, dtype=dtype)
    on_device = [zero if n is None else moved_to(n, device, dtype) for n in norms]
    for groups, indices in alike.items():
        if groups:
            squares = torch.stack([on_device[i] for i in indices]).square()
            for group in groups:
                torch.distributed.all_reduce(squares, group=group)
            for i, norm in zip(indices, squares.sqrt().unbind(), strict=True):
                on_device[i] = norm
    return torch.stack(on_device)


def averaged(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of plain tensors, averaged over the default process group, if there is one.

    Args:
        grads: This rank's; changed in place. None where its batch reached nothing.
        params: What they are of, in the same order on every rank.

    Returns:
        The means; without a process group `grads` as they are.
    """
    if not _in_group():
        return [*grads]
    # Every rank sends every tensor: which of them a rank has reached, the others do not know.
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
    for grad in filled:
        torch.distributed.all_reduce(grad)
        grad /= torch.distributed.get_world_size()
    return [*filled]


def refuse_unequal(norm: Tensor) -> None:
    """Raises where ranks would perturb differently; waits for the device and for all ranks.

    Args:
        norm: ‖∇h(w)‖ as this rank has it.

    Raises:
        RuntimeError: It is not the same on all ranks of the default process group.
    """
    if not _in_group():
        return
    ends = torch.stack([norm, -norm])
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    most, least = ends[0].item(), -ends[1].item()
    if most - least > 1e-3 * most:
        raise RuntimeError(
            "The first harmful pass left each rank with gradients of its own, so that each would "
            f"perturb in a direction of its own: ‖∇h(w)‖ is {least:.4g} on one rank and {most:.4g} "
            "on another. Run it where gradients are averaged: through the DistributedDataParallel "
            "module and outside no_sync(). Where ranks train models of their own, pass "
            "independent_ranks=True."
        )


def _in_group() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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


def _is_dtensor(tensor: Tensor) -> bool:
    # Where nobody has imported DTensor there are none, and the import would cost time.
    module = None if type(tensor) in _PLAIN else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
