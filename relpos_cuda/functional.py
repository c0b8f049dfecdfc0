"""The public functions: what they take and what they give.

All of them compute, for query token ``m = (h, w)`` and key token ``n = (i, j)`` on row-major grids,

    rel_h[m, i] = <q[m], Rh[h, i]>       Rh = get_rel_pos(q_h, k_h, rel_pos_h)
    rel_w[m, j] = <q[m], Rw[w, j]>       Rw = get_rel_pos(q_w, k_w, rel_pos_w)

with the *unscaled* ``q``, as SAM, ViTDet and MViTv2 do; video models add ``rel_t`` the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _checks, reference, tables
from ._apply import apply
from ._sharded import is_sharded, on_shares
from .autograd import AddDecomposedRelPos, attention


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Relative position vectors of all pairs of a query and a key coordinate, as in segment_anything.

    Args:
        q_size: Number of query coordinates along the axis.
        k_size: Number of key coordinates along the axis.
        rel_pos: Learned table ``[L, D]``, any floating dtype, any device; no DTensor. If ``L`` is not
            ``2 * max(q_size, k_size) - 1`` it is interpolated linearly to that length first.

    Returns:
        ``[q_size, k_size, D]`` in the dtype and on the device of ``rel_pos``; differentiable in it. With sizes that
        differ, coordinates are scaled to the finer grid and truncated, in float32, as all libraries do.

    Raises:
        ValueError: a size is not positive, or ``rel_pos`` is not a non-empty ``[L, D]``.
        TypeError: ``rel_pos`` is not floating point or a DTensor, or a size is not an int.

    Source: the function of the same name in segment_anything's image encoder (detectron2, MViT, transformers agree).
    """
    _checks.refuse_sharded(rel_pos=rel_pos)
    q_size = _checks.check_size("q_size", q_size)
    k_size = _checks.check_size("k_size", k_size)
    _checks.check_table("rel_pos", rel_pos, None)
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
            float64; any device. No DTensor.
        rel_pos_h, rel_pos_w: Learned tables ``[L, D]`` in the dtype of ``q`` or float32, on its device; interpolated
            linearly where ``L`` is not ``2 * max(q, k) - 1`` of their axis.
        q_size, k_size: Grids of the queries and of the keys, ``(h, w)``; ``(t, h, w)`` with ``rel_pos_t``.
        rel_pos_t: Table of the temporal axis, for video.

    Returns:
        ``(rel_h, rel_w)`` or ``(rel_h, rel_w, rel_t)`` of shapes ``[..., S, k_h]``, ``[..., S, k_w]``,
        ``[..., S, k_t]``, in the dtype of ``q``. Differentiable in ``q`` and the tables.

    Raises:
        ValueError: shapes, sizes or devices do not fit together (the message names argument, wanted, got).
        TypeError: a dtype is not supported, or a tensor is a DTensor.

    Source: `add_decomposed_rel_pos` of segment_anything-fast returns the same pair.
    """
    _checks.refuse_sharded(q=q, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w, rel_pos_t=rel_pos_t)
    grids = _checks.check_grids(q_size, k_size, rel_pos_t)
    tables_by_axis = _checks.check_queries(q, grids[0], rel_pos_h, rel_pos_w, rel_pos_t, 0)
    q, tables_by_axis = _checks.autocast(q, tables_by_axis)
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
        RuntimeError: ``attn`` is a leaf that requires grad, and to be written into.

    Source: the function of the same name in segment_anything, detectron2 and their descendants; with
    ``num_prefix_tokens=1`` and ``rel_pos_t``, the relative position of MViTv2.
    """
    if is_sharded(attn, q, rel_pos_h, rel_pos_w, rel_pos_t):
        share = partial(add_decomposed_rel_pos, q_size=q_size, k_size=k_size, num_prefix_tokens=num_prefix_tokens)
        named = {"rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w, "rel_pos_t": rel_pos_t}
        out = on_shares(share, {"attn": attn, "q": q}, named)
        return attn.copy_(out) if inplace else out
    q_grid, k_grid = _checks.check_grids(q_size, k_size, rel_pos_t)
    prefix = _checks.check_size("num_prefix_tokens", num_prefix_tokens, least=0)
    tables_by_axis = _checks.check_queries(q, q_grid, rel_pos_h, rel_pos_w, rel_pos_t, prefix)
    q, tables_by_axis = _checks.autocast(q, tables_by_axis)
    _checks.check_logits(attn, q, prefix + math.prod(q_grid), prefix + math.prod(k_grid))
    if inplace and attn.requires_grad and attn.is_leaf and torch.is_grad_enabled():
        raise RuntimeError("attn must not be a leaf Variable that requires grad, with inplace=True")
    if _wants_formula():
        more = _named(tables_by_axis, q) | {"num_prefix_tokens": prefix, "inplace": inplace}
        return reference.add_decomposed_rel_pos(attn, q, q_size=q_grid, k_size=k_grid, **more)
    table = tables.stack(tables_by_axis, q_grid, k_grid)
    index = tables.lookup(q_grid, k_grid, q.device)
    if inplace and torch.compiler.is_compiling():  # functionalised anyway
        return attn.copy_(apply(AddDecomposedRelPos, attn, q, table, index, q_grid, k_grid, prefix, False))
    return apply(AddDecomposedRelPos, attn, q, table, index, q_grid, k_grid, prefix, inplace)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: Sequence[int],
    k_size: Sequence[int],
    *,
    scale: float | None = None,
    rel_pos_t: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Attention with the decomposed relative position term; the logits and the bias are never stored whole.

    ``out = softmax(scale * q k^T + bias) v`` with ``bias[m, (i, j)] = rel_h[m, i] + rel_w[m, j]``, which is made of the
    unscaled ``q``. Logits are computed block by block, in float32 for half precision, and computed again in the
    backward: by C++ kernels on the CPU, by CUDA kernels for a D that is a multiple of 8 up to 128, in plain PyTorch by
    chunks of query rows elsewhere.

    Args:
        q: Unscaled queries ``[B, heads, S_q, D]`` or ``[B * heads, S_q, D]``, any strides (views of a packed qkv are
            fine); float16, bfloat16, float32 or float64; any device.
        k, v: Keys and values ``[B, heads, S_k, D]`` or ``[B * heads, S_k, D]``, with the leading axes, dtype and device
            of ``q``; any strides.
        rel_pos_h, rel_pos_w: Learned tables ``[L, D]`` in the dtype of ``q`` or float32, on its device; interpolated
            linearly where ``L`` is not ``2 * max(q, k) - 1`` of their axis.
        q_size, k_size: Grids of the queries and of the keys, ``(h, w)``; ``(t, h, w)`` with ``rel_pos_t``.
        scale: Multiplies ``q k^T`` and never the bias. Default ``D ** -0.5``.
        rel_pos_t: Table of the temporal axis, for video.
        num_prefix_tokens: Class tokens in front of both grids, counted in ``S_q`` and ``S_k``; they attend and are
            attended to without bias.

    Returns:
        ``[B, heads, S_q, D]`` or ``[B * heads, S_q, D]`` in the dtype of ``q``; in the first case a view of memory
        ``[B, S_q, heads, D]``, so that ``out.transpose(1, 2).flatten(2)`` is no copy. Differentiable once in ``q``,
        ``k``, ``v`` and the tables; bitwise deterministic. Under autocast all take its dtype, as for
        scaled_dot_product_attention.

    Raises:
        ValueError: shapes, sizes or devices do not fit together, or ``scale`` is not finite (the message names
            argument, wanted, got).
        TypeError: a dtype is not supported, or ``scale`` is not a number.

    Source: the attention of segment_anything's image encoder, of ViTDet and of MViTv2 (https://arxiv.org/abs/2112.01526)
    between their two Linear layers; no masks, no dropout.
    """
    if is_sharded(q, k, v, rel_pos_h, rel_pos_w, rel_pos_t):
        more: dict[str, Any] = {"scale": scale, "num_prefix_tokens": num_prefix_tokens}
        share = partial(rel_pos_attention, q_size=q_size, k_size=k_size, **more)
        named = {"rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w, "rel_pos_t": rel_pos_t}
        return on_shares(share, {"q": q, "k": k, "v": v}, named)
    q_grid, k_grid = _checks.check_grids(q_size, k_size, rel_pos_t)
    prefix = _checks.check_size("num_prefix_tokens", num_prefix_tokens, least=0)
    tables_by_axis = _checks.check_queries(q, q_grid, rel_pos_h, rel_pos_w, rel_pos_t, prefix)
    scale = _checks.check_scale(scale, q.shape[-1])
    q, tables_by_axis = _checks.autocast(q, tables_by_axis)
    keys = prefix + math.prod(k_grid)
    k, v = _checks.check_keys("k", k, q, keys), _checks.check_keys("v", v, q, keys)
    if _wants_formula():
        more = _named(tables_by_axis, q) | {"num_prefix_tokens": prefix, "scale": scale}
        return reference.rel_pos_attention(q, k, v, q_size=q_grid, k_size=k_grid, **more)
    table = tables.stack(tables_by_axis, q_grid, k_grid)
    index = tables.lookup(q_grid, k_grid, q.device)
    return attention(q, k, v, table, index, q_grid, k_grid, prefix, scale)


def _named(tables_by_axis: list[Tensor], q: Tensor) -> dict[str, Any]:
    """As the formulas take them, which mix no dtypes."""
    *of_t, of_h, of_w = (t.to(q.dtype) for t in tables_by_axis)
    return {"rel_pos_h": of_h, "rel_pos_w": of_w, "rel_pos_t": of_t[0] if of_t else None}


def _wants_formula() -> bool:
    """torch.jit.trace, and exporters to ONNX: what they write down must run where no op of ours is known."""
    traced = torch._C._get_tracing_state() is not None
    return traced or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
