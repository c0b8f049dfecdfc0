"""Attention with relative positions as a module, for models that are written anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .integrations.common import attention_of_qkv


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
        ValueError: ``dim`` is not a multiple of ``num_heads``, or ``input_size`` is not two positive numbers.

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
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")
        if len(input_size) != 2 or min(input_size) < 1:
            raise ValueError(f"input_size must be two positive numbers (h, w), got {input_size}")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads, device=device, dtype=dtype)) for size in input_size
        )

    def extra_repr(self) -> str:
        sizes = " x ".join(str((len(table) + 1) // 2) for table in (self.rel_pos_h, self.rel_pos_w))
        return f"num_heads={self.num_heads}, tables for {sizes}"

    def forward(self, x: Tensor) -> Tensor:
        tables = self.rel_pos_h, self.rel_pos_w
        return self.proj(attention_of_qkv(self.qkv(x), self.num_heads, self.scale, tables))
