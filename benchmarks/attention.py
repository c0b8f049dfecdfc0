"""The attention op against what is written without it.

Every peer gets q, k, v and the tables, and makes all else from them; its name in tables, and what it is:

    ours
    ours, mma.sync      the same where RELPOS_CUDA_WGMMA=0 asks sm_90 for the kernels of every architecture
    eager, SAM          softmax((scale * q k^T + rel_h) + rel_w) v, as segment_anything and its descendants write it
    eager, HF           bias first, then one addition, softmax in float32, as transformers writes it; on a GPU
    compiled            eager, SAM under torch.compile
    sdpa, dense bias    scaled_dot_product_attention with the bias as its mask; on a GPU, one peer per backend
    flex                FlexAttention with rel_h and rel_w read by its score_mod; on a CPU it has no backward
    concat              the factors appended to q and one-hot coordinates to k, so that one product gives their sum
    sdpa, no bias       less work: attention without relative positions; on a GPU, one peer per backend
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import relpos_cuda
from relpos_cuda import _env, reference

from .cases import LEAVES, Case, Inputs, draw  # noqa: F401
from .peers import Call, Peer, factors, on_grids

OURS, LEAST = "ours", "sdpa, no bias"
CUDA_BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
Function = Callable[[Inputs], Tensor]


def peer(name: str, function: Function, gradients: tuple[str, ...] = LEAVES, **more: Any) -> Peer:
    def on(x: Inputs) -> Call:
        x = x if gradients else x.detached()
        return Call(partial(function, x), tuple(getattr(x, leaf) for leaf in gradients), x.grad)

    return Peer(name, on, gradients, **more)


def formula(x: Inputs, q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    grids = (x.case.q_size, x.case.k_size)
    return reference.rel_pos_attention(q, k, v, rel_pos_h, rel_pos_w, *grids, num_prefix_tokens=x.case.prefix)


# ---- the peers as functions


def ours(x: Inputs) -> Tensor:
    return relpos_cuda.rel_pos_attention(x.q, x.k, x.v, *x.tables_and_grids, num_prefix_tokens=x.case.prefix)


def eager_sam(x: Inputs) -> Tensor:
    p, logits = x.case.prefix, (x.q * x.q.shape[-1] ** -0.5) @ x.k.mT
    rel_h, rel_w = (f[..., p:, :].unflatten(-2, x.case.q_size)[..., None] for f in factors(x))
    grids = on_grids(logits, p, x.case.q_size, x.case.k_size)
    if p:  # as torchvision does beside class tokens
        grids.add_(rel_h).add_(rel_w.mT)
    else:
        logits = (grids + rel_h + rel_w.mT).view(logits.shape)
    return logits.softmax(-1) @ x.v


def bias_of(x: Inputs) -> Tensor:
    """``[B, heads, S_q, S_k]``"""
    rel_h, rel_w = factors(x)
    bias = (rel_h[..., None] + rel_w[..., None, :]).flatten(-2)
    return functional.pad(bias, (x.case.prefix, 0)) if x.case.prefix else bias


def eager_hf(x: Inputs) -> Tensor:
    logits = (x.q * x.q.shape[-1] ** -0.5) @ x.k.mT
    logits = logits + bias_of(x)
    return logits.softmax(-1, dtype=torch.float32).to(x.q.dtype) @ x.v


def dense(x: Inputs) -> Tensor:
    return scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias_of(x))


def concat(x: Inputs) -> Tensor:
    """``[scale * q, rel_h, rel_w] . [k, one-hot row, one-hot column]``, padded to what the kernels of SDPA take."""
    scale, p = x.q.shape[-1] ** -0.5, x.case.prefix
    rows, columns = (torch.eye(n, dtype=x.k.dtype, device=x.k.device) for n in x.case.k_size)
    one_hot = torch.cat((rows.repeat_interleave(len(columns), 0), columns.repeat(len(rows), 1)), -1)
    one_hot = functional.pad(one_hot, (0, 0, p, 0)).expand(*x.k.shape[:2], -1, -1)
    q, k = torch.cat((x.q * scale, *factors(x)), -1), torch.cat((x.k, one_hot), -1)
    width = -(-q.shape[-1] // 8) * 8
    q, k, v = (functional.pad(t, (0, width - t.shape[-1])) for t in (q, k, x.v))
    return scaled_dot_product_attention(q, k, v, scale=1.0)[..., : x.v.shape[-1]]


def flex(x: Inputs) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    (rel_h, rel_w), p, k_w = factors(x), x.case.prefix, x.case.k_size[1]
    torch._dynamo.graph_break()  # on a CPU, inductor does not find what its own graph has made

    def score_mod(score: Tensor, b: Tensor, head: Tensor, m: Tensor, n: Tensor) -> Tensor:
        if not p:
            return score + rel_h[b, head, m, n // k_w] + rel_w[b, head, m, n % k_w]
        cell = torch.where(n < p, 0, n - p)
        biased = score + rel_h[b, head, m, cell // k_w] + rel_w[b, head, m, cell % k_w]
        return torch.where(n < p, score, biased)

    return flex_attention(x.q, x.k, x.v, score_mod=score_mod)


def no_bias(x: Inputs) -> Tensor:
    return scaled_dot_product_attention(x.q, x.k, x.v)


# ---- all that can be tried on a device


@contextlib.contextmanager
def without_wgmma() -> Iterator[None]:
    """Launchers ask for it in every call; a graph keeps what it was captured with."""
    before = os.environ.get(_env.WGMMA.name)
    os.environ[_env.WGMMA.name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_env.WGMMA.name]
        else:
            os.environ[_env.WGMMA.name] = before


def peers_of(case: Case, device: str, compiled: bool) -> list[Peer]:
    peers = [peer(OURS, ours), peer("eager, SAM", eager_sam)]
    less = {"gradients": ("q", "k", "v"), "note": "less work: no relative positions"}
    if device == "cuda":
        around = {name: partial(sdpa_kernel, backend) for name, backend in CUDA_BACKENDS.items()}
        peers += [
            peer("eager, HF", eager_hf),  # costs a CPU what the other eager one costs
            peer("sdpa, dense bias, efficient", dense, around=around["efficient"]),
            peer("sdpa, dense bias, cudnn", dense, gradients=(), around=around["cudnn"]),
            *(peer(f"concat, {name}", concat, around=backend) for name, backend in around.items()),
            *(peer(f"{LEAST}, {name}", no_bias, around=backend, **less) for name, backend in around.items()),
        ]
    else:
        peers += [peer("sdpa, dense bias", dense), peer("concat", concat), peer(LEAST, no_bias, **less)]
    if compiled:
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        peers += [
            peer("compiled", torch.compile(eager_sam, dynamic=False, mode=mode)),
            peer("flex", torch.compile(flex, dynamic=False), LEAVES if device == "cuda" else ()),
        ]
    return peers
