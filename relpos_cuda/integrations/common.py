"""What the fused forwards of several libraries share."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

Grid = tuple[int, ...]


def is_traced(x: Tensor) -> bool:
    """By torch.fx, as extractors of features do, which know the operations of the library and look for them."""
    return isinstance(x, fx.Proxy)


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
        batch, heads, _, head_dim = x.shape  # not in unflatten, which has the older exporter to ONNX keep them
        channels_first = grid.flatten(0, 1).transpose(1, 2)
        image = pool(channels_first.reshape(batch * heads, head_dim, *size).contiguous())
        size = image.shape[2:]
        grid = image.flatten(2).transpose(1, 2).reshape(batch, heads, size[0] * size[1], head_dim)
        x = torch.cat((token, grid), dim=2) if prefix else grid
    return x if norm is None else norm(x), size
