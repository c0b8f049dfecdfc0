"""The logits op against the formula.

Every peer gets the same logits, q and tables, and makes bias and sum from them.

    ours, in place / out of place
    eager                        (attn.view + rel_h) + rel_w, as segment_anything and its descendants write it
    eager, in place              the same with add_, as MViT writes it
    compiled                     eager under torch.compile
    bare add_(1), bare add(1)    less work, one pass over the same memory: what nothing in place, or out of it, can beat
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import relpos_cuda
from relpos_cuda import reference

from . import cases
from .cases import Case, Inputs
from .peers import Call, Peer, factors, on_grids

OURS, LEAST = "ours, in place", "bare add_(1)"
LEAVES = ("attn", "q", "rel_pos_h", "rel_pos_w")
Function = Callable[[Tensor, Inputs], Tensor]


def draw(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Logits instead of k and v; a gradient of their shape."""
    x = cases.draw(case, dtype, device, seed)
    attn, grad = (torch.randn_like(x.q @ x.k.mT, requires_grad=False) for _ in range(2))
    return dataclasses.replace(x, attn=attn, grad=grad)


def formula(x: Inputs, attn: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    grids = (x.case.q_size, x.case.k_size)
    return reference.add_decomposed_rel_pos(attn, q, rel_pos_h, rel_pos_w, *grids, num_prefix_tokens=x.case.prefix)


# ---- the peers as functions


def ours(attn: Tensor, x: Inputs, inplace: bool) -> Tensor:
    more = {"num_prefix_tokens": x.case.prefix, "inplace": inplace}
    return relpos_cuda.add_decomposed_rel_pos(attn, x.q, *x.tables_and_grids, **more)


def eager(attn: Tensor, x: Inputs, inplace: bool = False) -> Tensor:
    p, grids = x.case.prefix, (x.case.q_size, x.case.k_size)
    rel_h, rel_w = (f[..., p:, :].unflatten(-2, grids[0])[..., None] for f in factors(x))
    if not (inplace or p):
        return (on_grids(attn, p, *grids) + rel_h + rel_w.mT).view(attn.shape)
    out = attn if inplace else attn.clone()
    on_grids(out, p, *grids).add_(rel_h).add_(rel_w.mT)
    return out


class Intermediate(torch.autograd.Function):
    """Makes a leaf an intermediate result without a copy, so that in-place peers may write into it."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


# ---- all that can be tried on a device


def peer(name: str, function: Function, **more: Any) -> Peer:
    def on(x: Inputs) -> Call:
        leaf = x.attn.detach().requires_grad_()
        return Call(lambda: function(Intermediate.apply(leaf), x), (leaf, x.q, *x.tables), x.grad)

    return Peer(name, on, **{"gradients": LEAVES, **more})


def peers_of(case: Case, device: str, compiled: bool) -> list[Peer]:
    less = {"gradients": (), "note": "less work: no relative positions"}
    peers = [
        peer(OURS, partial(ours, inplace=True)),
        peer("ours, out of place", partial(ours, inplace=False)),
        peer("eager", eager),
        peer("eager, in place", partial(eager, inplace=True)),
        peer("bare add_(1)", lambda attn, x: attn.add_(1), **less),
        peer("bare add(1)", lambda attn, x: attn + 1, **less),
    ]
    if compiled:
        peers.append(peer("compiled", torch.compile(eager, dynamic=False)))
    return peers
