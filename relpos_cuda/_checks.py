"""What the public functions refuse, in whose words: argument, wanted, got."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import tables
from ._sharded import is_sharded

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_size(name: str, value: int, least: int = 1) -> int:
    try:
        size = operator.index(value)  # torch.compile: a symbolic size becomes a constant
    except TypeError:
        size = None
    if size is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def check_grids(
    q_size: Sequence[int], k_size: Sequence[int], rel_pos_t: Tensor | None
) -> tuple[tables.Grid, tables.Grid]:
    axes, wanted = (2, "(h, w)") if rel_pos_t is None else (3, "(t, h, w), because rel_pos_t is given")
    return check_grid("q_size", q_size, (axes,), wanted), check_grid("k_size", k_size, (axes,), wanted)


def check_grid(name: str, size: Sequence[int], axes: Sequence[int], wanted: str) -> tables.Grid:
    if not isinstance(size, Sequence) or len(size) not in axes:
        raise ValueError(f"{name} must be {wanted}, got {size!r}")
    return tuple(check_size(f"{name}[{a}]", n) for a, n in enumerate(size))


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def refuse_sharded(**named: Tensor | None) -> None:
    for name, x in named.items():
        if is_sharded(x):
            raise TypeError(f"{name} must be a local tensor, got a DTensor")


def check_table(name: str, table: Tensor, q: Tensor | None) -> None:
    check_tensor(name, table)
    if table.dtype not in _DTYPES:
        raise TypeError(f"{name} must be floating point, got {table.dtype}")
    if table.dim() != 2 or table.numel() == 0 or (q is not None and table.shape[1] != q.shape[-1]):
        wanted = "[L, D]" if q is None else f"[L, {q.shape[-1]}]"
        raise ValueError(f"{name} must be {wanted}, got {list(table.shape)}")
    if q is None:
        return
    if table.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {table.device}")
    if table.dtype not in (q.dtype, torch.float32) and not _is_autocast_enabled(q):
        raise TypeError(f"{name} must be {q.dtype} like q, or torch.float32, got {table.dtype}")


def check_queries(
    q: Tensor, q_grid: tables.Grid, rel_pos_h: Tensor, rel_pos_w: Tensor, rel_pos_t: Tensor | None, prefix: int
) -> list[Tensor]:
    """Checks ``q`` and the tables; returns the tables in the order of the axes."""
    check_tokens(q, q_grid, prefix)
    named = [("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)]
    if rel_pos_t is not None:
        named.insert(0, ("rel_pos_t", rel_pos_t))
    for name, table in named:
        check_table(name, table, q)
    return [table for _, table in named]


def check_tokens(q: Tensor, q_grid: tables.Grid, prefix: int) -> None:
    check_tensor("q", q)
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    tokens = prefix + math.prod(q_grid)
    if q.dim() not in (3, 4) or q.shape[-1] == 0:
        raise ValueError(f"q must be [B, heads, S, D] or [B * heads, S, D], got {list(q.shape)}")
    if q.shape[-2] != tokens:
        grid = " * ".join(map(str, q_grid)) + (f" + {prefix} prefix" if prefix else "")
        raise ValueError(f"q must have S = {grid} = {tokens} tokens, got {q.shape[-2]} in {list(q.shape)}")


def check_logits(attn: Tensor, q: Tensor, rows: int, columns: int) -> None:
    check_tensor("attn", attn)
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


def check_keys(name: str, keys: Tensor, q: Tensor, columns: int) -> Tensor:
    """``k`` or ``v`` as autocast wants it, against queries that are checked and as autocast wants them."""
    check_tensor(name, keys)
    if keys.dtype != q.dtype:
        keys = keys.to(autocast_dtype(keys))
    if keys.dtype != q.dtype:
        raise TypeError(f"{name} must be {q.dtype} like q, got {keys.dtype}")
    if keys.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {keys.device}")
    wanted = (*q.shape[:-2], columns, q.shape[-1])
    if keys.shape != wanted:
        raise ValueError(f"{name} must be {list(wanted)} to go with q and k_size, got {list(keys.shape)}")
    return keys


def check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return operator.index(head_dim) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a float or None, got {scale!r}")
    if not abs(scale) <= sys.float_info.max:  # math.isfinite cannot be traced
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def autocast_dtype(t: Tensor) -> torch.dtype:
    """As for scaled_dot_product_attention: autocast's own for all but float64, where it is enabled."""
    if t.dtype not in _DTYPES[:3] or not _is_autocast_enabled(t):
        return t.dtype
    return torch.get_autocast_dtype(t.device.type)


def _is_autocast_enabled(t: Tensor) -> bool:
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)  # meta: no such device for it


def autocast(q: Tensor, tables_by_axis: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Queries and tables as autocast wants them; float32 tables stay, since the ops round them."""
    wanted = autocast_dtype(q)
    q = q if q.dtype == wanted else q.to(wanted)
    return q, [t if t.dtype in (torch.float32, wanted) else t.to(wanted) for t in tables_by_axis]
