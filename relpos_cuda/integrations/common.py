"""What the fused forwards of several libraries share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

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


def pooled(
    x: Tensor,  # [B, heads, prefix + H * W, D]
    pool: nn.Module | None,
    norm: nn.Module | None,
    size: Grid,  # (H, W)
    prefix: int = 0,
) -> tuple[Tensor, Grid]:
    """MViTv2's: the grid pooled behind its class token, everything normalised; and the new size of the grid."""
    if pool is not None:
        token, grid = x[:, :, :prefix], x[:, :, prefix:]
        image = pool(grid.flatten(0, 1).transpose(1, 2).unflatten(2, tuple(size)).contiguous())
        size = image.shape[2:]
        grid = image.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        x = torch.cat((token, grid), dim=2) if prefix else grid
    return x if norm is None else norm(x), size
