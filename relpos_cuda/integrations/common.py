"""What the fused forwards of several libraries share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx

from ..functional import rel_pos_attention

Grid = tuple[int, ...]


def is_traced(x: Tensor) -> bool:
    """By torch.fx, as extractors of features do, which know the operations of the library and look for them."""
    return isinstance(x, fx.Proxy)


def attention_of_qkv(
    qkv: Tensor,  # [B, H, W, 3 * heads * D], as the projection gives it
    heads: int,
    scale: float,
    tables: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Self-attention on a grid, ``[B, H, W, heads * D]``; q, k and v are views of ``qkv``, read where they lie."""
    batch, height, width, _ = qkv.shape
    q, k, v = qkv.reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if tables is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = rel_pos_attention(q, k, v, *tables, (height, width), (height, width), scale=scale)
    return out.transpose(1, 2).reshape(batch, height, width, -1)
