"""The logits op against the formula.

Every peer gets the same logits, q and tables, and makes bias and sum from them.

    bare add_(1), bare add(1)    one pass over the same memory: what no work in place, or out of place, can beat
    ours, in place / out of place
    eager                        (attn.view + rel_h) + rel_w, as segment_anything and its descendants write it
    eager, in place              the same with add_, as MViT writes it
    compiled                     eager under torch.compile
"""

from __future__ import annotations

import torch
from torch import Tensor

import relpos_cuda

from .cases import Case
from .peers import Peer, Peers, by_pass, factors, must_be_right, normal, tables_of, without_gradients

OURS, LEAST = "ours, in place", "bare add_(1)"


def eager(attn: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size, k_size, inplace=False) -> Tensor:
    rel_h, rel_w = factors(q, rel_pos_h, rel_pos_w, q_size, k_size)
    on_grids = attn.view(-1, *q_size, *k_size)
    if inplace:
        on_grids.add_(rel_h[..., None]).add_(rel_w[..., None, :])
        return attn
    return (on_grids + rel_h[..., None] + rel_w[..., None, :]).view(attn.shape)


class Intermediate(torch.autograd.Function):
    """Makes a leaf an intermediate result without a copy, so that in-place peers may write into it."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def peers_of(case: Case, dtype: torch.dtype, device: str, compiled: bool) -> Peers:
    attn, grad = (normal(case.groups, case.rows, case.columns, dtype=dtype, device=device) for _ in range(2))
    q = normal(case.groups, case.rows, case.head_dim, dtype=dtype, device=device).requires_grad_()
    tables = tables_of(case, dtype, device)
    grids = (case.q_size, case.k_size)
    ours = relpos_cuda.add_decomposed_rel_pos

    def forward(function, **more) -> Peer:
        return without_gradients(function, attn, q, *tables, *grids, **more)

    def both(function, **more) -> Peer:
        def run():
            leaf = attn.detach().requires_grad_()
            out = function(Intermediate.apply(leaf), q, *tables, *grids, **more)
            torch.autograd.grad(out, (leaf, q, *tables), grad)

        return run

    check(case, attn, q, tables)
    passes = {
        "forward": {
            "bare add_(1)": lambda: attn.add_(1),
            "bare add(1)": lambda: attn + 1,
            "ours, in place": forward(ours, inplace=True),
            "ours, out of place": forward(ours),
            "eager": forward(eager),
            "eager, in place": forward(eager, inplace=True),
        },
        "forward + backward": {
            "ours, in place": both(ours, inplace=True),
            "ours, out of place": both(ours),
            "eager": both(eager),
            "eager, in place": both(eager, inplace=True),
        },
    }
    if compiled:
        torch._dynamo.reset()
        passes["forward"]["compiled"] = forward(torch.compile(eager, dynamic=False))
        passes["forward + backward"]["compiled"] = both(torch.compile(eager, dynamic=False))
    return by_pass(passes)


def check(case: Case, attn: Tensor, q: Tensor, tables: list[Tensor]) -> None:
    """The first group."""
    one = [t.detach() for t in (attn[:1], q[:1], *tables)]
    grids = (case.q_size, case.k_size)
    exact = eager(*(t.double() for t in one), *grids)
    must_be_right(case, relpos_cuda.add_decomposed_rel_pos(*one, *grids), eager(*one, *grids), exact)
