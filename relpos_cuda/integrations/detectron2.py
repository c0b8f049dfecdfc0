"""detectron2: MViTv2, whose queries and keys are pooled first and windowed then. ViTDet is in :mod:`.sam_like`.

Windows are padded behind the projection: unlike in ViTDet, keys and values of the padding are zero, and attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import rel_pos_attention
from .adapters import Adapter

Size = Sequence[int]  # (height, width)


def mvit(self: Any, x: Tensor) -> Tensor:
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    q, k, v = qkv.flatten(1, 2).unbind(0)  # [B * heads, H, W, D]
    q = pooled(q, self.pool_q, self.norm_q)
    k = pooled(k, self.pool_k, self.norm_k)
    v = pooled(v, self.pool_v, self.norm_v)

    q_size = (self.q_win_size,) * 2 if self.window_size else q.shape[1:3]
    k_size = (self.kv_win_size,) * 2 if self.window_size else k.shape[1:3]
    tokens = windows(q, q_size), windows(k, k_size), windows(v, k_size)
    out = rel_pos_attention(*tokens, self.rel_pos_h, self.rel_pos_w, q_size, k_size, scale=self.scale)
    out = from_windows(out, q_size, q.shape[1:3])
    if self.residual_pooling:
        out = out + q
    return self.proj(out.unflatten(0, (-1, self.num_heads)).permute(0, 2, 3, 1, 4).flatten(3))


def pooled(x: Tensor, pool: nn.Module, norm: nn.Module) -> Tensor:
    return norm(pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def windows(x: Tensor, size: Size) -> Tensor:
    """``[N, H, W, D]`` as ``[N * windows, tokens, D]``, padded with zeros where they do not fit."""
    below, right = -x.shape[1] % size[0], -x.shape[2] % size[1]
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, size: Size, whole: Size) -> Tensor:
    """The reverse."""
    counts = [-(-tokens // each) for tokens, each in zip(whole, size, strict=True)]
    x = x.unflatten(1, tuple(size)).unflatten(0, (-1, *counts))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : whole[0], : whole[1]]


def has_none(module: Any) -> str | None:
    return None if module.use_rel_pos else "it has no relative positions"


ADAPTERS = (Adapter("detectron2", ("detectron2.modeling.backbone.mvit.MultiScaleAttention",), mvit, has_none),)
