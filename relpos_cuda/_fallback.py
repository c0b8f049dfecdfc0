"""The ops in plain PyTorch: where no native library is to be had, and for the few problems no kernel takes.

Slower, but right and memory-bounded: beside the logits themselves nothing of size S x S is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def logits_fwd(
    out: Tensor,  # [G, M, N]
    attn: Tensor | None,  # the same, or None: out already holds the logits
    q: Tensor,  # [B, heads, M, D] or [G, M, D]
    table: Tensor,  # [rows, D]
    index: Tensor,
    q_size: Sequence[int],
    k_size: Sequence[int],
    num_prefix_tokens: int,
) -> None:
    if attn is not None:
        out.copy_(attn)
    logits = _on_grids(out, q, q_size, k_size, num_prefix_tokens)
    accumulate = _accumulation_dtype(q)
    grid = _query_grid(q, q_size, num_prefix_tokens).to(accumulate)
    for axis, rows in _axes(index, q_size, k_size):
        factor = _factors(grid, table[rows].to(accumulate), axis, len(q_size))
        shape = [1] * len(k_size)
        shape[axis] = k_size[axis]
        logits.add_(factor.unflatten(-1, shape))


def logits_bwd(
    dq: Tensor | None,
    dtable: Tensor | None,
    grad: Tensor,  # [G, M, N]
    q: Tensor,
    table: Tensor,
    index: Tensor,
    factors: Tensor | None,  # work spaces of the CUDA kernels
    partials: Tensor | None,
    q_size: Sequence[int],
    k_size: Sequence[int],
    num_prefix_tokens: int,
) -> None:
    on_grids = _on_grids(grad, q, q_size, k_size, num_prefix_tokens)
    accumulate = _accumulation_dtype(q)
    grid = _query_grid(q, q_size, num_prefix_tokens).to(accumulate)
    dgrid = torch.zeros_like(grid)
    if dtable is not None:
        dtable.zero_()
    axes = len(q_size)
    for axis, rows in _axes(index, q_size, k_size):
        others = [1 + axes + a for a in range(axes) if a != axis]
        dfactor = _sum(on_grids, others, accumulate)  # [G, *q_size, k]
        by_coordinate = dfactor.movedim(1 + axis, 0).flatten(1, -2)  # [q, queries, k]
        if dq is not None:
            part = by_coordinate @ table[rows].to(accumulate)
            dgrid += part.unflatten(1, _without(grid.shape[:-1], 1 + axis)).movedim(0, 1 + axis)
        if dtable is not None:
            d_rows = by_coordinate.mT @ grid.movedim(1 + axis, 0).flatten(1, -2)  # [q, k, D]
            _add_rows(dtable, rows.flatten(), d_rows.flatten(0, 1).to(dtable.dtype))
    if dq is not None:
        dq.zero_()
        dq.view(-1, *dq.shape[-2:])[:, num_prefix_tokens:].copy_(dgrid.flatten(1, -2))


def _accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [n for a, n in enumerate(shape) if a != axis]


def _on_grids(t: Tensor, q: Tensor, q_size: Sequence[int], k_size: Sequence[int], prefix: int) -> Tensor:
    """View of the logits' grid part, ``[G, *q_size, *k_size]``."""
    groups, queries = q.shape[:-2].numel(), q.shape[-2]
    part = t.view(groups, queries, prefix + math.prod(k_size))[:, prefix:, prefix:]
    return part.unflatten(2, k_size).unflatten(1, q_size)


def _query_grid(q: Tensor, q_size: Sequence[int], prefix: int) -> Tensor:
    return q[..., prefix:, :].reshape(-1, *q_size, q.shape[-1])


def _axes(index: Tensor, q_size: Sequence[int], k_size: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Every axis with the table row of each pair of its coordinates, ``[q, k]``."""
    start = 0
    for axis, (q, k) in enumerate(zip(q_size, k_size, strict=True)):
        yield axis, index[start : start + q * k].view(q, k).long()
        start += q * k


def _factors(grid: Tensor, rows: Tensor, axis: int, axes: int) -> Tensor:
    """``<q[m], R[c(m), i]>`` as ``[G, *q_size, k]``; ``rows`` is ``[q, k, D]``."""
    letters = "thw"[-axes:]
    c = letters[axis]
    return torch.einsum(f"g{letters}d,{c}id->g{letters}i", grid, rows)


def _sum(logits: Tensor, axes: list[int], dtype: torch.dtype) -> Tensor:
    """``logits.sum(axes, dtype)``, a group at a time: PyTorch converts all it sums before it sums it."""
    if logits.dtype == dtype or not len(logits):
        return logits.sum(axes, dtype=dtype)
    return torch.cat([group.sum(axes, dtype=dtype) for group in logits.split(1)])


def _add_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """``target[rows] += values`` in a fixed order: each call is deterministic on the device it serves."""
    if target.device.type == "cuda":
        target.index_put_((rows,), values, accumulate=True)
    else:
        target.index_add_(0, rows, values)
