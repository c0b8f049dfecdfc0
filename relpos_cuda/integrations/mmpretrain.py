"""mmpretrain: its SAM encoder, which copies segment_anything's, and MViTv2.

Its MViTv2 has no class token, and resizes tables as SAM does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import rel_pos_attention
from . import sam_like
from .adapters import Adapter
from .common import Grid, pooled


def mvit(self: Any, x: Tensor, in_size: Grid) -> tuple[Tensor, Grid]:
    q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, q_size = pooled(q, self.pool_q, self.norm_q, in_size)
    k, k_size = pooled(k, self.pool_k, self.norm_k, in_size)
    v, _ = pooled(v, self.pool_v, self.norm_v, in_size)
    out = rel_pos_attention(q, k, v, self.rel_pos_h, self.rel_pos_w, q_size, k_size, scale=self.scale)
    if self.residual_pooling:
        out = out + q
    return self.proj(out.transpose(1, 2).flatten(2)), q_size


def has_none(module: Any) -> str | None:
    return None if module.rel_pos_spatial else "it has no relative positions"


ADAPTERS = (
    Adapter("mmpretrain", ("mmpretrain.models.backbones.vit_sam.Attention",), sam_like.forward),
    Adapter("mmpretrain", ("mmpretrain.models.backbones.mvit.MultiScaleAttention",), mvit, has_none),
)
