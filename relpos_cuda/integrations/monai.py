"""MONAI: SABlock with ``rel_pos_embedding="decomposed"`` and two axes.

With three axes it adds the terms to axes of the keys that are not theirs, and raises unless the last two are equal:
such blocks keep their own forward. A block takes the one grid that it was made for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import rel_pos_attention
from .adapters import Adapter, stock


def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if attn_mask is not None or self.causal or weights_are_wanted(self) or self.attention_dtype not in (None, x.dtype):
        return stock(self, x, attn_mask)
    if self.use_combined_linear:
        q, k, v = self.input_rearrange(self.qkv(x)).unbind(0)
    else:
        q, k, v = (self.input_rearrange(projection(x)) for projection in (self.to_q, self.to_k, self.to_v))
    positions = self.rel_positional_embedding
    table_h, table_w = positions.rel_pos_arr
    size = positions.s_input_dims
    out = rel_pos_attention(q, k, v, table_h, table_w, size, size, scale=self.scale)
    return self.drop_output(self.out_proj(self.out_rearrange(out)))


def weights_are_wanted(self: Any) -> bool:
    dropout = self.drop_weights
    return bool(self.save_attn or dropout._forward_hooks or (dropout.training and dropout.p))


def is_not_2d(module: Any) -> str | None:
    positions = module.rel_positional_embedding
    if positions is None:
        return "it has no relative positions"
    return None if len(positions.rel_pos_arr) == 2 else "with three axes, monai's formula is another"


ADAPTERS = (Adapter("monai", ("monai.networks.blocks.selfattention.SABlock",), forward, is_not_2d),)
