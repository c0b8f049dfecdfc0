"""Attention with relative positions as a module, for models that are written anew; and what those of others share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from .functional import rel_pos_attention


def attention_of_qkv(
    qkv: Tensor,  # [B, H, W, 3 * heads * D], as the projection gives it
    heads: int,
    scale: float,
    tables: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Self-attention on a grid, ``[B, H, W, heads * D]``; q, k and v are views of ``qkv``, read where they lie."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // (3 * heads)  # a size of -1 would be ambiguous in an empty batch
    q, k, v = qkv.reshape(batch, height * width, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    if tables is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = rel_pos_attention(q, k, v, *tables, (height, width), (height, width), scale=scale)
    return out.transpose(1, 2).reshape(batch, height, width, heads * head_dim)


class RelPosAttention(nn.Module):
    """Multi-head self-attention on a grid, with the decomposed relative position term.

    Parameters have the names that SAM, ViTDet and most of their kin give them: ``qkv``, ``proj``, ``rel_pos_h``,
    ``rel_pos_w``. A state_dict of one of their attention layers loads.

    Args:
        dim: Channels of input and output.
        num_heads: Divides ``dim``.
        input_size: Grid ``(h, w)`` that the tables are made for; others interpolate them.
        qkv_bias: Whether ``qkv`` has a bias.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``[B, H, W, dim]``, in the dtype and on the device of the parameters.

    Raises:
        ValueError: a size is not positive, ``dim`` is not a multiple of ``num_heads``, or the input not of this shape.
        TypeError: a size is not an int, or the input no tensor.

    Source: the attention of segment_anything's image encoder; tables start at zero there, too.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: tuple[int, int],
        *,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = _checks.check_size("dim", dim), _checks.check_size("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")
        grid = _checks.check_grid("input_size", input_size, (2,), "(h, w)")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads, device=device, dtype=dtype)) for size in grid
        )

    def extra_repr(self) -> str:
        sizes = " x ".join(str((len(table) + 1) // 2) for table in (self.rel_pos_h, self.rel_pos_w))
        return f"num_heads={self.num_heads}, tables for {sizes}"

    def forward(self, x: Tensor) -> Tensor:
        _checks.check_tensor("x", x)
        if x.dim() != 4 or x.shape[-1] != self.qkv.in_features or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"x must be [B, H, W, {self.qkv.in_features}], got {list(x.shape)}")
        tables = self.rel_pos_h, self.rel_pos_w
        return self.proj(attention_of_qkv(self.qkv(x), self.num_heads, self.scale, tables))
