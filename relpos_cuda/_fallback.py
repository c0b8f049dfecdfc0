"""The logits ops in plain PyTorch: where no native library is to be had, and for the few problems no kernel takes.

Slower, but right and memory-bounded: where logits are narrower than their sums, a chunk of them is widened at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Logits of a chunk. Below 32 MiB the C library keeps the memory for the next chunk; above, the system clears it anew.
CHUNK_BYTES = 24 << 20


def outside_autocast(function: Callable[..., None]) -> Callable[..., None]:
    """Runs an op with the dtypes it was given: autocast has acted before it, and must not round its float32 sums."""

    @functools.wraps(function)
    def run(*args: Any) -> None:
        kind = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.is_autocast_enabled(kind):
            return function(*args)
        with torch.autocast(kind, enabled=False):
            return function(*args)

    return run


@outside_autocast
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
    logits = _on_grid(out, q, k_size, num_prefix_tokens)
    bias = []
    for axis, factor in enumerate(factors(q, table, index, q_size, k_size, num_prefix_tokens)):
        shape = [1] * len(k_size)
        shape[axis] = k_size[axis]
        bias.append(factor.flatten(1, -2).unflatten(-1, shape))
    wide = accumulation_dtype(q)
    for chunk in _chunks(logits, wide):
        part = logits[chunk]
        total = part.to(wide)  # itself, where it is wide
        for factor in bias:
            total += factor[chunk]
        part.copy_(total)


@outside_autocast
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
    dlogits, axes = _on_grid(grad, q, k_size, num_prefix_tokens), len(k_size)
    others = [[2 + a for a in range(axes) if a != axis] for axis in range(axes)]
    wide = accumulation_dtype(q)
    dfactors = (_sum(dlogits, o, wide).unflatten(1, q_size) for o in others)  # one at a time, [G, *q_size, k]
    if dtable is not None:
        dtable.zero_()
    dgrid = factors_bwd(dtable, dfactors, q, table, index, q_size, k_size, num_prefix_tokens)
    if dq is not None:
        dq.zero_()
        dq.view(-1, *dq.shape[-2:])[:, num_prefix_tokens:].copy_(dgrid.flatten(1, -2))


def factors(
    q: Tensor, table: Tensor, index: Tensor, q_size: Sequence[int], k_size: Sequence[int], num_prefix_tokens: int
) -> Iterator[Tensor]:
    """``<q[m], R[c(m), i]>`` of every axis, ``[G, *q_size, k]``, in the dtype of accumulation."""
    accumulate = accumulation_dtype(q)
    grid = _query_grid(q, q_size, num_prefix_tokens).to(accumulate)
    letters = "thw"[-len(q_size) :]
    for c, (_, rows) in zip(letters, _axes(index, q_size, k_size), strict=True):
        yield torch.einsum(f"g{letters}d,{c}id->g{letters}i", grid, table[rows].to(accumulate))


def factors_bwd(
    dtable: Tensor | None,  # [rows, D]: added to
    dfactors: Iterable[Tensor],  # of every axis, [G, *q_size, k]
    q: Tensor,
    table: Tensor,
    index: Tensor,
    q_size: Sequence[int],
    k_size: Sequence[int],
    num_prefix_tokens: int,
) -> Tensor:
    """Gradient of the grid tokens of ``q``, ``[G, *q_size, D]`` in the dtype of accumulation."""
    accumulate = accumulation_dtype(q)
    grid = _query_grid(q, q_size, num_prefix_tokens).to(accumulate)
    dgrid = torch.zeros_like(grid)
    for (axis, rows), dfactor in zip(_axes(index, q_size, k_size), dfactors, strict=True):
        by_coordinate = dfactor.movedim(1 + axis, 0).flatten(1, -2)  # [q, queries, k]
        part = by_coordinate @ table[rows].to(accumulate)
        dgrid += part.unflatten(1, _without(grid.shape[:-1], 1 + axis)).movedim(0, 1 + axis)
        if dtable is not None:
            d_rows = by_coordinate.mT @ grid.movedim(1 + axis, 0).flatten(1, -2)  # [q, k, D]
            _add_rows(dtable, rows.flatten(), d_rows.flatten(0, 1).to(dtable.dtype))
    return dgrid


def accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [n for a, n in enumerate(shape) if a != axis]


def _on_grid(t: Tensor, q: Tensor, k_size: Sequence[int], prefix: int) -> Tensor:
    """View of the logits without class tokens, ``[G, queries, *k_size]``."""
    groups, queries = math.prod(q.shape[:-2]), q.shape[-2]
    return t.view(groups, queries, prefix + math.prod(k_size))[:, prefix:, prefix:].unflatten(2, k_size)


def _chunks(logits: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Groups, or some queries of one: as many as keep to the budget when they are widened."""
    groups, queries, *k_size = logits.shape
    fit = max(1, CHUNK_BYTES // (math.prod(k_size) * wide.itemsize))  # queries
    step, groups_step = min(queries, fit), max(1, fit // queries)
    for g in range(0, groups, groups_step):
        for m in range(0, queries, step):
            yield slice(g, g + groups_step), slice(m, m + step)


def _query_grid(q: Tensor, q_size: Sequence[int], prefix: int) -> Tensor:
    return q[..., prefix:, :].reshape(-1, *q_size, q.shape[-1])


def _axes(index: Tensor, q_size: Sequence[int], k_size: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Every axis with the table row of each pair of its coordinates, ``[q, k]``."""
    start = 0
    for axis, (q, k) in enumerate(zip(q_size, k_size, strict=True)):
        yield axis, index[start : start + q * k].view(q, k).long()
        start += q * k


def _sum(logits: Tensor, axes: list[int], wide: torch.dtype) -> Tensor:
    """``logits.sum(axes, dtype=wide)``, a chunk at a time: PyTorch widens all it sums before it sums it."""
    if logits.dtype == wide:
        return logits.sum(axes)
    (kept,) = set(range(2, logits.dim())).difference(axes)
    sums = logits.new_empty((*logits.shape[:2], logits.shape[kept]), dtype=wide)
    for chunk in _chunks(logits, wide):
        sums[chunk] = logits[chunk].sum(axes, dtype=wide)
    return sums


def _add_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """``target[rows] += values`` in a fixed order: each call is deterministic on the device it serves."""
    if target.device.type == "cuda":
        target.index_put_((rows,), values, accumulate=True)
    else:
        target.index_add_(0, rows, values)
