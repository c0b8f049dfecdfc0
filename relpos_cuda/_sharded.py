"""DTensors, sharded over batch or heads: every process calls the op on its share, with whole tables.

q, k, v, attn   Shard(0), Shard(1) or Replicate, as q has it; out as q
tables          Replicate; their gradients are sums over the shares, Partial until somebody reduces them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor, without importing torch.distributed."""
    return any(hasattr(x, "device_mesh") and hasattr(x, "placements") for x in tensors)


def on_shares(function: Callable[..., Tensor], operands: dict[str, Any], tables: dict[str, Any]) -> Tensor:
    """``function(**operands, **tables)`` on local tensors, and its result as a DTensor like the first operand.

    Raises:
        ValueError: a tensor is no DTensor, or one on another mesh; the first operand is sharded along tokens or
            channels, or not yet reduced; or it is sharded and another has other leading axes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    given = {name: x for name, x in (operands | tables).items() if x is not None}
    for name, x in given.items():
        if not is_sharded(x):
            raise ValueError(f"{name} must be a DTensor, as others are, got {type(x).__name__}: distribute_tensor it")
    first_name, first = next(iter(operands.items()))
    mesh, placements = first.device_mesh, first.placements
    for name, x in given.items():
        if x.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh {mesh}, got {x.device_mesh}")
    leading = first.dim() - 2
    for placement in placements:
        if not (placement.is_replicate() or placement.is_shard() and placement.dim % first.dim() < leading):
            wanted = "sharded along batch or heads, or replicated"
            raise ValueError(f"{first_name} must be {wanted}, got {list(placements)}")
    for name, x in operands.items():  # the axis that one is sharded along is that of all
        if x.shape[:-2] != first.shape[:-2] and not all(placement.is_replicate() for placement in placements):
            wanted = f"the leading axes of {first_name}, {list(first.shape[:-2])}, which is sharded along one of them"
            raise ValueError(f"{name} must have {wanted}; got {list(x.shape)}")
    local = {name: x.redistribute(mesh, placements).to_local() for name, x in operands.items()}
    whole = [Replicate()] * mesh.ndim
    of_shares = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    for name, x in tables.items():
        local[name] = None if x is None else x.redistribute(mesh, whole).to_local(grad_placements=of_shares)
    out = function(**local)
    with torch.device("meta"):
        layout = _empty_laid_out_like(out, first.shape)
    return DTensor.from_local(out, mesh, placements, run_check=False, shape=first.shape, stride=layout.stride())


def _empty_laid_out_like(local: Tensor, shape: torch.Size) -> Tensor:
    """Of this shape, its axes in memory in the order of the local result's."""
    order = sorted(range(len(shape)), key=lambda axis: local.stride(axis), reverse=True)
    return torch.empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
