"""The attention op against what is written without it.

Every peer but the last gets the same q, k, v and tables, and makes the bias from them.

    ours
    sdpa, dense bias    scaled_dot_product_attention with the bias as its mask, whatever backend PyTorch chooses
    eager               softmax(scale * q k^T + rel_h + rel_w) v, as segment_anything writes it
    compiled            eager under torch.compile
    sdpa, no bias       less work: attention without relative positions
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import relpos_cuda

from .cases import Case
from .peers import Peer, Peers, by_pass, factors, must_be_right, normal, tables_of, without_gradients

OURS, LEAST = "ours", "sdpa, no bias"


def bias_of(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size, k_size) -> Tensor:
    rel_h, rel_w = factors(q, rel_pos_h, rel_pos_w, q_size, k_size)
    return (rel_h[..., None] + rel_w[..., None, :]).reshape(*q.shape[:-1], -1)


def dense(q: Tensor, k: Tensor, v: Tensor, *tables_and_grids) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=bias_of(q, *tables_and_grids))


def eager(q: Tensor, k: Tensor, v: Tensor, *tables_and_grids) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias_of(q, *tables_and_grids)
    return logits.softmax(-1) @ v


def no_bias(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def peers_of(case: Case, dtype: torch.dtype, device: str, compiled: bool) -> Peers:
    def tokens(count: int) -> Tensor:
        return normal(1, case.groups, count, case.head_dim, dtype=dtype, device=device)

    q, k, v = (tokens(n).requires_grad_() for n in (case.rows, case.columns, case.columns))
    grad, tables = tokens(case.rows), tables_of(case, dtype, device)
    arguments = (q, k, v, *tables, case.q_size, case.k_size)

    def both(function: Callable, leaves: tuple[Tensor, ...] = (q, k, v, *tables)) -> Peer:
        return lambda: torch.autograd.grad(function(*arguments), leaves, grad)

    check(case, q, k, v, tables)
    functions = {"ours": relpos_cuda.rel_pos_attention, "sdpa, dense bias": dense, "eager": eager}
    if compiled:
        torch._dynamo.reset()
        functions["compiled"] = torch.compile(eager, dynamic=False)
    passes = {
        "forward": {name: without_gradients(f, *arguments) for name, f in functions.items()},
        "forward + backward": {name: both(f) for name, f in functions.items()},
    }
    passes["forward"]["sdpa, no bias"] = without_gradients(no_bias, *arguments)
    passes["forward + backward"]["sdpa, no bias"] = both(no_bias, (q, k, v))
    return by_pass(passes)


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor]) -> None:
    """The first head."""
    one = [t.detach() for t in (q[:, :1], k[:, :1], v[:, :1], *tables)]
    grids = (case.q_size, case.k_size)
    exact = eager(*(t.double() for t in one), *grids)
    must_be_right(case, relpos_cuda.rel_pos_attention(*one, *grids), eager(*one, *grids), exact)
