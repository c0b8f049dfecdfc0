"""The attention ops in plain PyTorch: any device, and no more than a chunk of the S x S logits at a time.

    p  = softmax(scale * q k^T + bias)        of a chunk of query rows, all keys: no running maximum is needed
    ds = p * (dp - sum over keys of p * dp)   with dp = grad v^T; the sum is <grad, out> without the rounding of out

A block is some heads of some batch elements, whole groups as far as they fit; the rows of a larger group come in
chunks. Sums over chunks and blocks run in a fixed order. Factors of the bias are made per block: they are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _fallback

Block = tuple[slice, slice]  # batch elements, heads


class Bias(NamedTuple):
    """The operands of all ops that make the bias."""

    table: Tensor  # [rows, D]
    lookup: Tensor  # the index
    q_size: Sequence[int]
    k_size: Sequence[int]
    num_prefix_tokens: int


@_fallback.outside_autocast
@torch.no_grad()
def attention_fwd(
    out: Tensor,  # [B, heads, M, D] or [G, M, D], as q
    lse: Tensor | None,  # [G, M]
    q: Tensor,
    k: Tensor,  # [B, heads, N, D] or [G, N, D], as v
    v: Tensor,
    table: Tensor,
    index: Tensor,
    q_size: Sequence[int],
    k_size: Sequence[int],
    num_prefix_tokens: int,
    scale: float,
) -> None:
    wide = _fallback.accumulation_dtype(q)
    bias = Bias(table, index, q_size, k_size, num_prefix_tokens)
    out, q, k, v = (_with_batch(t) for t in (out, q, k, v))
    lse = None if lse is None else lse.view(q.shape[:-1])
    for block, chunks in _blocks(q, k, wide):
        queries, keys, values = q[block], k[block].to(wide), v[block].to(wide)
        factors = _factors(queries, bias)
        for rows in chunks:
            logits = _logits(queries[:, :, rows], keys, [f[:, :, rows] for f in factors], bias, scale)
            p = logits.softmax(-1)
            out[block][:, :, rows] = p @ values
            if lse is not None:  # the largest p is exp(largest logit - lse)
                lse[block][:, :, rows] = logits.amax(-1) - p.amax(-1).log()


@_fallback.outside_autocast
@torch.no_grad()
def attention_bwd(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dtable: Tensor | None,  # [rows, D]
    grad: Tensor,  # as q
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # for kernels that do not see a whole row of p at once, as is lse
    lse: Tensor,
    table: Tensor,
    index: Tensor,
    _factors: Tensor | None,  # work spaces of the CUDA kernels
    _partials: Tensor | None,
    _columns: Tensor | None,
    _lines: Tensor | None,
    q_size: Sequence[int],
    k_size: Sequence[int],
    num_prefix_tokens: int,
    scale: float,
) -> None:
    bias = Bias(table, index, q_size, k_size, num_prefix_tokens)
    grad, q, k, v = (_with_batch(t) for t in (grad, q, k, v))
    targets = [None if t is None else _with_batch(t) for t in (dq, dk, dv)]
    if dtable is not None:
        dtable.zero_()
    for block, chunks in _blocks(q, k, _fallback.accumulation_dtype(q)):
        sums = _block_bwd(targets, dtable, chunks, grad[block], q[block], k[block], v[block], bias, scale)
        for target, total in zip(targets, sums, strict=True):
            if target is not None and total is not None:
                target[block] = total


def _block_bwd(
    wanted: Sequence[Tensor | None],  # dq, dk, dv
    dtable: Tensor | None,
    chunks: Sequence[slice],
    grad: Tensor,  # [b, h, M, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Bias,
    scale: float,
) -> list[Tensor | None]:
    """dq, dk and dv of a block, as far as they are wanted, in the dtype of accumulation."""
    wide, prefix = _fallback.accumulation_dtype(q), bias.num_prefix_tokens
    dq, dk, dv = sums = [
        None if w is None else torch.zeros(t.shape, dtype=wide, device=t.device)
        for w, t in zip(wanted, (q, k, v), strict=True)
    ]
    keys, values = k.to(wide), v.to(wide)
    factors = _factors(q, bias)
    dfactors = [torch.empty_like(f) for f in factors] if dq is not None or dtable is not None else []
    for rows in chunks:
        queries, g = q[:, :, rows].to(wide), grad[:, :, rows].to(wide)
        p = _logits(queries, keys, [f[:, :, rows] for f in factors], bias, scale).softmax(-1)
        if dv is not None:
            dv += p.mT @ g
        if not dfactors and dk is None:
            continue
        ds = torch._softmax_backward_data(g @ values.mT, p, -1, wide)  # one pass, the very one of eager
        if dq is not None:
            dq[:, :, rows] = scale * (ds @ keys)
        if dk is not None:
            dk += ((scale * queries).mT @ ds).mT  # summed as in eager; ds^T q is up to 5 times off
        for axis, dfactor in enumerate(dfactors):
            others = [3 + a for a in range(len(dfactors)) if a != axis]
            dfactor[:, :, rows] = ds[..., prefix:].unflatten(-1, bias.k_size).sum(others)
    if dfactors:
        on_grids = (d[:, :, prefix:].flatten(0, 1).unflatten(1, bias.q_size) for d in dfactors)
        dgrid = _fallback.factors_bwd(dtable, on_grids, q, *bias)
        if dq is not None:
            dq[:, :, prefix:] += dgrid.flatten(1, -2).unflatten(0, q.shape[:2])
    return sums


def _with_batch(t: Tensor) -> Tensor:
    return t if t.dim() == 4 else t[None]


def _blocks(q: Tensor, k: Tensor, wide: torch.dtype) -> Iterator[tuple[Block, list[slice]]]:
    """Blocks of groups and, for each, chunks of query rows whose logits keep to the budget."""
    batch, heads, rows, _ = q.shape
    fit = max(1, _fallback.CHUNK_BYTES // (k.shape[2] * wide.itemsize))  # rows of logits
    if batch * heads == 0:
        return
    step = min(rows, fit)
    heads_step = min(heads, max(1, fit // rows))
    batch_step = min(batch, max(1, fit // (rows * heads)))
    for b in range(0, batch, batch_step):
        for h in range(0, heads, heads_step):
            block = (slice(b, b + batch_step), slice(h, h + heads_step))
            yield block, [slice(m, min(m + step, rows)) for m in range(0, rows, step)]


def _factors(q: Tensor, bias: Bias) -> list[Tensor]:
    """Of every axis ``[b, h, M, k]``; zero for class tokens."""
    groups, prefix = q.shape[:2], bias.num_prefix_tokens
    factors = (f.flatten(1, -2).unflatten(0, groups) for f in _fallback.factors(q, *bias))
    return [F.pad(f, (0, 0, prefix, 0)) if prefix else f for f in factors]


def _logits(q: Tensor, keys: Tensor, factors: Sequence[Tensor], bias: Bias, scale: float) -> Tensor:
    """``scale * q k^T + bias`` for some rows, ``[b, h, rows, N]``: the bias first, then the product on top of it."""
    *outer_axes, inner = factors
    outer = outer_axes[0]
    for factor in outer_axes[1:]:
        outer = (outer[..., :, None] + factor[..., None, :]).flatten(-2)  # [.., k_t * k_h]
    logits = keys.new_empty(*q.shape[:-1], keys.shape[-2])
    logits[..., : bias.num_prefix_tokens] = 0
    by_line = logits[..., bias.num_prefix_tokens :].unflatten(-1, (outer.shape[-1], inner.shape[-1]))
    torch.add(outer[..., :, None], inner[..., None, :], out=by_line)
    logits.flatten(0, 1).baddbmm_(q.to(keys.dtype).flatten(0, 1), keys.flatten(0, 1).mT, alpha=scale)
    return logits
