"""torchvision: the video models MViTv2, with a class token and three axes.

Its index is the usual one in another order of operations. Without an integer ratio between the grids that may truncate
to other rows, as for 39 queries and 10 keys; such calls are left to it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..functional import rel_pos_attention
from ..tables import index
from .adapters import Adapter, stock
from .common import Grid, is_traced


def forward(self: Any, x: Tensor, thw: Grid) -> tuple[Tensor, Grid]:
    if is_traced(x) or not rows_agree(pooled_size(self.pool_q, thw), pooled_size(self.pool_k, thw)):
        return stock(self, x, thw)
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    q, q_size = self.pool_q(q, thw) if self.pool_q is not None else (q, thw)
    k, k_size = self.pool_k(k, thw) if self.pool_k is not None else (k, thw)
    v, _ = self.pool_v(v, thw) if self.pool_v is not None else (v, thw)

    tables = {name: getattr(self, name) for name in ("rel_pos_h", "rel_pos_w", "rel_pos_t")}
    out = rel_pos_attention(q, k, v, q_size=q_size, k_size=k_size, scale=self.scaler, num_prefix_tokens=1, **tables)
    if self.residual_pool:
        attended, out = out, out + q
        if not self.residual_with_cls_embed:
            out[:, :, :1] = attended[:, :, :1]
    return self.project(out.transpose(1, 2).flatten(2)), q_size


def pooled_size(pool: Any, thw: Grid) -> Grid:
    """Before the work is done, which is half of the layer's."""
    if pool is None:
        return thw
    axes = zip(thw, pool.pool.kernel_size, pool.pool.stride, pool.pool.padding, strict=True)
    return tuple((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in axes)


def rows_agree(q_size: Grid, k_size: Grid) -> bool:
    return all(axis_agrees(q, k) for q, k in zip(q_size, k_size, strict=True))


@functools.lru_cache(maxsize=256)
def axis_agrees(q: int, k: int) -> bool:
    """Whether torchvision's order of operations gives the rows of ours."""
    with _disable_current_modes():
        queries = torch.arange(q, device="cpu")[:, None] * max(k / q, 1.0)
        keys = (torch.arange(k, device="cpu") + (1.0 - k)) * max(q / k, 1.0)
        return torch.equal((queries - keys).long(), index(q, k))


rows_agree._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as tables.lookup


def has_none(module: Any) -> str | None:
    return "it has no relative positions" if module.rel_pos_h is None else None


ADAPTERS = (Adapter("torchvision", ("torchvision.models.video.mvit.MultiscaleAttention",), forward, has_none),)
