"""The public functions as formulas: einsum, any dtype, any device, autograd by PyTorch. The oracle of every test.

Same signatures as :mod:`relpos_cuda.functional`; nothing is checked and everything of size S x S is materialised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tables


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Vector of every pair of coordinates, ``[q_size, k_size, D]``."""
    table = tables.resize(rel_pos, tables.rows_of(q_size, k_size))
    return table[tables.index(q_size, k_size).to(table.device)]


def decomposed_rel_pos(
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: tables.Grid,
    k_size: tables.Grid,
    *,
    rel_pos_t: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``rel_h[m, i] = <q[m], Rh[h, i]>`` and its siblings, each ``[..., S_q, k]``, in the order h, w(, t)."""
    grid = q.unflatten(-2, tuple(q_size))
    *_, k_h, k_w = k_size
    *_, q_h, q_w = q_size
    if rel_pos_t is None:
        rel_h = torch.einsum("...hwd,hid->...hwi", grid, get_rel_pos(q_h, k_h, rel_pos_h))
        rel_w = torch.einsum("...hwd,wjd->...hwj", grid, get_rel_pos(q_w, k_w, rel_pos_w))
        return rel_h.flatten(-3, -2), rel_w.flatten(-3, -2)
    rel_h = torch.einsum("...thwd,hid->...thwi", grid, get_rel_pos(q_h, k_h, rel_pos_h))
    rel_w = torch.einsum("...thwd,wjd->...thwj", grid, get_rel_pos(q_w, k_w, rel_pos_w))
    rel_t = torch.einsum("...thwd,tsd->...thws", grid, get_rel_pos(q_size[0], k_size[0], rel_pos_t))
    return rel_h.flatten(-4, -2), rel_w.flatten(-4, -2), rel_t.flatten(-4, -2)


def add_decomposed_rel_pos(
    attn: Tensor,
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: tables.Grid,
    k_size: tables.Grid,
    *,
    rel_pos_t: Tensor | None = None,
    num_prefix_tokens: int = 0,
    inplace: bool = False,
) -> Tensor:
    """``attn + rel_h[.., :, None] + rel_w[.., None, :]`` on the grid part of ``attn``, prefix tokens left alone."""
    p = num_prefix_tokens
    factors = decomposed_rel_pos(q[..., p:, :], rel_pos_h, rel_pos_w, q_size, k_size, rel_pos_t=rel_pos_t)
    rel_h, rel_w = factors[:2]
    bias = rel_h[..., :, None] + rel_w[..., None, :]
    if rel_pos_t is not None:
        bias = factors[2][..., :, None, None] + bias[..., None, :, :]
    bias = bias.flatten(q.dim() - 1)
    if p:
        bias = torch.nn.functional.pad(bias, (p, 0, p, 0))
    return attn.add_(bias.reshape(attn.shape)) if inplace else attn + bias.reshape(attn.shape)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: tables.Grid,
    k_size: tables.Grid,
    *,
    scale: float | None = None,
    rel_pos_t: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """``softmax(scale * q k^T + bias) v``; the bias is that of the unscaled ``q``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = add_decomposed_rel_pos(
        (q * scale) @ k.transpose(-2, -1),
        q,
        rel_pos_h,
        rel_pos_w,
        q_size,
        k_size,
        rel_pos_t=rel_pos_t,
        num_prefix_tokens=num_prefix_tokens,
    )
    return logits.softmax(-1) @ v
