"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: multiplications and additions of all products.

Those of the backward include what is computed anew, as PyTorch counts its own attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _ops  # noqa: F401, defines them

ops = torch.ops.relpos_cuda

Shape = Sequence[int]


def _factors(q: Shape, k_size: Sequence[int], num_prefix_tokens: int) -> int:
    return 2 * math.prod(q[:-2]) * (q[-2] - num_prefix_tokens) * sum(k_size) * q[-1]


def _product(q: Shape, k: Shape) -> int:
    return 2 * math.prod(q[:-1]) * k[-2] * k[-1]


@register_flop_formula(ops.logits_fwd)
def _logits_fwd(out: Shape, attn: Shape, q: Shape, *others: Any, **_: Any) -> int:
    k_size, prefix = others[-2:]
    return _factors(q, k_size, prefix)


@register_flop_formula(ops.logits_bwd)
def _logits_bwd(dq: Shape, dtable: Shape, grad: Shape, q: Shape, *others: Any, **_: Any) -> int:
    k_size, prefix = others[-2:]
    return 2 * _factors(q, k_size, prefix)


@register_flop_formula(ops.attention_fwd)
def _attention_fwd(out: Shape, lse: Shape, q: Shape, k: Shape, *others: Any, **_: Any) -> int:
    k_size, prefix, _scale = others[-3:]
    return 2 * _product(q, k) + _factors(q, k_size, prefix)


@register_flop_formula(ops.attention_bwd)
def _attention_bwd(*inputs: Any, **_: Any) -> int:
    (q, k), (k_size, prefix, _scale) = inputs[5:7], inputs[-3:]
    return 5 * _product(q, k) + 3 * _factors(q, k_size, prefix)
