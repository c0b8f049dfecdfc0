"""The public functions: what they take, what they refuse, in whose words.

All of them compute, for query token ``m = (h, w)`` and key token ``n = (i, j)`` on row-major grids,

    rel_h[m, i] = <q[m], Rh[h, i]>       Rh = get_rel_pos(q_h, k_h, rel_pos_h)
    rel_w[m, j] = <q[m], Rw[w, j]>       Rw = get_rel_pos(q_w, k_w, rel_pos_w)

with the *unscaled* ``q``, as SAM, ViTDet and MViTv2 do; video models add ``rel_t`` the same way.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, tables
from .autograd import AddDecomposedRelPos

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Relative position vectors of all pairs of a query and a key coordinate, as in segment_anything.

    Args:
        q_size: Number of query coordinates along the axis.
        k_size: Number of key coordinates along the axis.
        rel_pos: Learned table ``[L, D]``, any floating dtype, any device. If ``L`` is not
            ``2 * max(q_size, k_size) - 1`` it is interpolated linearly to that length first.

    Returns:
        ``[q_size, k_size, D]`` in the dtype and on the device of ``rel_pos``; differentiable in it. With sizes that
        differ, coordinates are scaled to the finer grid and truncated, in float32, as all libraries do.

    Raises:
        ValueError: a size is not positive, or ``rel_pos`` is not a non-empty ``[L, D]``.
        TypeError: ``rel_pos`` is not floating point, or a size is not an int.

    Source: the function of the same name in segment_anything's image encoder (detectron2, MViT, transformers agree).
    """
    q_size = _check_size("q_size", q_size)
    k_size = _check_size("k_size", k_size)
    _check_table("rel_pos", rel_pos, None)
    return reference.get_rel_pos(q_size, k_size, rel_pos)


def decomposed_rel_pos(
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: Sequence[int],
    k_size: Sequence[int],
    *,
    rel_pos_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The factors of the bias, before anything of size S x S exists.

    Args:
        q: Unscaled queries ``[B, heads, S, D]`` or ``[B * heads, S, D]``, any strides; float16, bfloat16, float32 or
            float64; any device.
        rel_pos_h, rel_pos_w: Learned tables ``[L, D]`` in the dtype of ``q`` or float32, on its device; interpolated
            linearly where ``L`` is not ``2 * max(q, k) - 1`` of their axis.
        q_size, k_size: Grids of the queries and of the keys, ``(h, w)``; ``(t, h, w)`` with ``rel_pos_t``.
        rel_pos_t: Table of the temporal axis, for video.

    Returns:
        ``(rel_h, rel_w)`` or ``(rel_h, rel_w, rel_t)`` of shapes ``[..., S, k_h]``, ``[..., S, k_w]``,
        ``[..., S, k_t]``, in the dtype of ``q``. Differentiable in ``q`` and the tables.

    Raises:
        ValueError: shapes, sizes or devices do not fit together (the message names argument, wanted, got).
        TypeError: a dtype is not supported.

    Source: `add_decomposed_rel_pos` of segment_anything-fast returns the same pair.
    """
    grids = _check_grids(q_size, k_size, rel_pos_t)
    tables_by_axis = _check_queries(q, grids[0], rel_pos_h, rel_pos_w, rel_pos_t, 0)
    q, tables_by_axis = _autocast(q, tables_by_axis)
    *rel_t, rel_h, rel_w = (t.to(q.dtype) for t in tables_by_axis)
    return reference.decomposed_rel_pos(q, rel_h, rel_w, *grids, rel_pos_t=rel_t[0] if rel_t else None)


def add_decomposed_rel_pos(
    attn: Tensor,
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: Sequence[int],
    k_size: Sequence[int],
    *,
    rel_pos_t: Tensor | None = None,
    num_prefix_tokens: int = 0,
    inplace: bool = False,
) -> Tensor:
    """``attn + rel_h + rel_w (+ rel_t)`` in a single pass over ``attn``, forward and backward.

    ``out[m, (i, j)] = attn[m, (i, j)] + rel_h[m, i] + rel_w[m, j]``: table rows are gathered, multiplied with ``q``
    and added while the logits stream through once; the bias is never stored. Sums are float32 and rounded once.

    Args:
        attn: Attention logits ``[..., S_q, S_k]`` whose leading axes multiply to those of ``q``; in the dtype of ``q``,
            or float32 with half precision ``q``. Any strides, though only contiguous logits are streamed in place.
        q: Unscaled queries ``[B, heads, S_q, D]`` or ``[B * heads, S_q, D]``, any strides (views of a packed qkv are
            not copied); float16, bfloat16, float32, or float64 on the CPU. On the CPU and on NVIDIA GPUs fused, on
            other devices by plain PyTorch.
        rel_pos_h, rel_pos_w: Learned tables ``[L, D]`` in the dtype of ``q`` or float32, on its device; interpolated
            linearly where ``L`` is not ``2 * max(q, k) - 1`` of their axis.
        q_size, k_size: Grids of the queries and of the keys, ``(h, w)``; ``(t, h, w)`` with ``rel_pos_t``.
        rel_pos_t: Table of the temporal axis, for video.
        num_prefix_tokens: Class tokens in front of both grids, counted in ``S_q`` and ``S_k``; their rows and columns
            get no bias.
        inplace: Write into ``attn`` and return it. Differentiable like any in-place operation of PyTorch.

    Returns:
        The logits with the bias, shape and dtype of ``attn``. Differentiable once in ``attn`` (the gradient passes
        through without a copy), ``q`` and the tables; bitwise deterministic.

    Raises:
        ValueError: shapes, sizes or devices do not fit together (the message names argument, wanted, got).
        TypeError: a dtype is not supported.

    Source: the function of the same name in segment_anything, detectron2 and their descendants; with
    ``num_prefix_tokens=1`` and ``rel_pos_t``, the relative position of MViTv2.
    """
    q_grid, k_grid = _check_grids(q_size, k_size, rel_pos_t)
    prefix = _check_size("num_prefix_tokens", num_prefix_tokens, least=0)
    tables_by_axis = _check_queries(q, q_grid, rel_pos_h, rel_pos_w, rel_pos_t, prefix)
    q, tables_by_axis = _autocast(q, tables_by_axis)
    _check_logits(attn, q, prefix + math.prod(q_grid), prefix + math.prod(k_grid))
    table = tables.stack(tables_by_axis, q_grid, k_grid)
    index = tables.lookup(q_grid, k_grid, q.device)
    if inplace and torch.compiler.is_compiling():  # functionalised anyway
        return attn.copy_(AddDecomposedRelPos.apply(attn, q, table, index, q_grid, k_grid, prefix, False))
    return AddDecomposedRelPos.apply(attn, q, table, index, q_grid, k_grid, prefix, inplace)


# ---- checks: argument, wanted, got


def _check_size(name: str, value: int, least: int = 1) -> int:
    try:
        size = operator.index(value)  # torch.compile: a symbolic size becomes a constant
    except TypeError:
        size = None
    if size is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def _check_grids(
    q_size: Sequence[int], k_size: Sequence[int], rel_pos_t: Tensor | None
) -> tuple[tables.Grid, tables.Grid]:
    axes, wanted = (2, "(h, w)") if rel_pos_t is None else (3, "(t, h, w), because rel_pos_t is given")
    grids = []
    for name, size in (("q_size", q_size), ("k_size", k_size)):
        if isinstance(size, Tensor) or not isinstance(size, Sequence) or len(size) != axes:
            raise ValueError(f"{name} must be {wanted}, got {size!r}")
        grids.append(tuple(_check_size(f"{name}[{a}]", n) for a, n in enumerate(size)))
    return grids[0], grids[1]


def _check_table(name: str, table: Tensor, q: Tensor | None) -> None:
    if table.dtype not in _DTYPES:
        raise TypeError(f"{name} must be floating point, got {table.dtype}")
    wanted = "[L, D]" if q is None else f"[L, {q.shape[-1]}]"
    if table.dim() != 2 or table.numel() == 0 or (q is not None and table.shape[1] != q.shape[-1]):
        raise ValueError(f"{name} must be {wanted}, got {list(table.shape)}")
    if q is None:
        return
    if table.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {table.device}")
    if table.dtype not in (q.dtype, torch.float32) and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"{name} must be {q.dtype} like q, or torch.float32, got {table.dtype}")


def _check_queries(
    q: Tensor, q_grid: tables.Grid, rel_pos_h: Tensor, rel_pos_w: Tensor, rel_pos_t: Tensor | None, prefix: int
) -> list[Tensor]:
    """Checks ``q`` and the tables; returns the tables in the order of the axes."""
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    tokens = prefix + math.prod(q_grid)
    if q.dim() not in (3, 4) or q.shape[-1] == 0:
        raise ValueError(f"q must be [B, heads, S, D] or [B * heads, S, D], got {list(q.shape)}")
    if q.shape[-2] != tokens:
        grid = " * ".join(map(str, q_grid)) + (f" + {prefix} prefix" if prefix else "")
        raise ValueError(f"q must have S = {grid} = {tokens} tokens, got {q.shape[-2]} in {list(q.shape)}")
    named = [("rel_pos_t", rel_pos_t), ("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)]
    present = [(name, t) for name, t in named if t is not None]
    for name, table in present:
        _check_table(name, table, q)
    return [table for _, table in present]


def _check_logits(attn: Tensor, q: Tensor, rows: int, columns: int) -> None:
    if attn.dtype != q.dtype and not (attn.dtype == torch.float32 and q.dtype != torch.float64):
        raise TypeError(f"attn must be {q.dtype} like q, or torch.float32 with half precision, got {attn.dtype}")
    if attn.device != q.device:
        raise ValueError(f"attn must be on {q.device} like q, got {attn.device}")
    groups = math.prod(q.shape[:-2])
    if attn.dim() < 2 or attn.shape[-2:] != (rows, columns) or math.prod(attn.shape[:-2]) != groups:
        raise ValueError(
            f"attn must be [..., {rows}, {columns}] with {groups} = {' * '.join(map(str, q.shape[:-2]))} "
            f"matrices, got {list(attn.shape)}"
        )


def _autocast(q: Tensor, tables_by_axis: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """As for scaled_dot_product_attention: under autocast, queries take its dtype (tables are rounded in the op)."""
    kind = q.device.type
    if kind == "meta" or q.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return q, tables_by_axis
    q = q.to(torch.get_autocast_dtype(kind))
    return q, [t if t.dtype == torch.float32 else t.to(q.dtype) for t in tables_by_axis]
