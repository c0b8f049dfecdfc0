"""timm: its SAM encoder and MViTv2.

MViTv2 never resizes a table. On a grid smaller than the table's it reads the first rows, which belong to other offsets;
on a larger one (which an odd grid is, once pooled) it raises IndexError. Both are matched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..functional import rel_pos_attention
from .adapters import Adapter, stock
from .common import Grid, is_traced, pooled


def sam(self: Any, x: Tensor) -> Tensor:
    if is_traced(x) or weights_are_wanted(self.attn_drop, self.training):
        return stock(self, x)
    batch, height, width, _ = x.shape
    q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k, size = self.q_norm(q), self.k_norm(k), (height, width)
    out = rel_pos_attention(q, k, v, self.rel_pos_h, self.rel_pos_w, size, size, scale=self.scale)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, height, width, -1)))


def weights_are_wanted(dropout: Any, training: bool) -> bool:
    """By dropout at work, which looks at either flag, or by hooks, as those of timm's AttentionExtract."""
    if dropout._forward_hooks or dropout._forward_pre_hooks:
        return True
    return bool((training or dropout.training) and dropout.p)


def mvit(self: Any, x: Tensor, feat_size: Grid) -> tuple[Tensor, Grid | list[int]]:
    if is_traced(x):
        return stock(self, x, feat_size)
    prefix = int(self.has_cls_token)
    q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, q_size = pooled(q, self.pool_q, self.norm_q, feat_size, prefix)
    k, k_size = pooled(k, self.pool_k, self.norm_k, feat_size, prefix)
    v, _ = pooled(v, self.pool_v, self.norm_v, feat_size, prefix)

    rows_h, rows_w = (2 * max(sizes) - 1 for sizes in zip(q_size, k_size, strict=True))
    if len(self.rel_pos_h) < rows_h or len(self.rel_pos_w) < rows_w:
        return stock(self, x, feat_size)
    tables = self.rel_pos_h[:rows_h], self.rel_pos_w[:rows_w]
    out = rel_pos_attention(q, k, v, *tables, q_size, k_size, scale=self.scale, num_prefix_tokens=prefix)
    if self.residual_pooling:
        out = out + q
    return self.proj(out.transpose(1, 2).flatten(2)), q_size if self.pool_q is None else list(q_size)


def has_none(module: Any) -> str | None:
    has_tables = module.use_rel_pos if hasattr(module, "use_rel_pos") else module.rel_pos_type == "spatial"
    return None if has_tables else "it has no relative positions"


def is_broken(module: nn.Module) -> str:
    return "its own forward raises: timm does not transpose its keys"


ADAPTERS = (
    Adapter("timm", ("timm.models.vision_transformer_sam.Attention",), sam, has_none),
    Adapter("timm", ("timm.models.mvitv2.MultiScaleAttention",), mvit, has_none),
    Adapter("timm", ("timm.models.mvitv2.MultiScaleAttentionPoolFirst",), mvit, is_broken),
)
