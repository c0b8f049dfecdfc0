"""Gradients: one torch.autograd.Function per op, nothing of size S x S saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _fallback, _fallback_attention, _ops, support, tables
from ._apply import apply, is_transformed
from ._fallback import accumulation_dtype

Gradients = Callable[..., tuple[Tensor | None, ...]]

_TABLE_BLOCKS = 396  # blocks of the table gradient that keep a large GPU busy, all at once: 3 on each of 132 SMs ...
_QUERIES_PER_BLOCK = 64  # ... as long as each has this many queries to sum


class AddDecomposedRelPos(torch.autograd.Function):
    """``attn + bias(q, table)``; the gradient of ``attn`` is the incoming one, untouched and not copied."""

    @staticmethod
    def forward(
        attn: Tensor,  # [..., M, N]
        q: Tensor,  # [B, heads, M, D] or [G, M, D]
        table: Tensor,  # [rows, D]
        index: Tensor,
        q_size: tables.Grid,
        k_size: tables.Grid,
        num_prefix_tokens: int,
        inplace: bool,
    ) -> Tensor:
        problem = (q_size, k_size, num_prefix_tokens)
        operands = (_with_contiguous_rows(q), table.to(q.dtype), index, *problem)
        run = _ops.logits_fwd if support.fused(q, *problem) else _fallback.logits_fwd
        if inplace:
            dense = _dense(attn)
            run(dense, None, *operands)
            return attn if dense is attn else attn.copy_(dense)
        out = torch.empty_like(attn, memory_format=torch.contiguous_format)
        run(out, _dense(attn), *operands)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        attn, q, table, index, *problem, inplace = inputs
        ctx.save_for_backward(q, table, index)
        ctx.problem = tuple(problem)
        if inplace:
            ctx.mark_dirty(attn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_attn, *needs = ctx.needs_input_grad[:3]
        found = _once(_logits_gradients, (ctx.problem, needs), grad, *ctx.saved_tensors) if any(needs) else (None, None)
        return grad if needs_attn else None, *found, None, None, None, None, None


def _logits_gradients(
    problem: tuple[Any, ...], needs: list[bool], grad: Tensor, q: Tensor, table: Tensor, index: Tensor
) -> tuple[Tensor | None, ...]:
    """Of q and the table, as far as they are needed."""
    needs_q, needs_table = needs
    q_size, k_size, _ = problem
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs_q else None
    d_table = torch.empty(table.shape, dtype=accumulation_dtype(q), device=q.device) if needs_table else None
    work_spaces = _work_spaces(q, q_size, k_size, needs_table)
    operands = (_dense(grad), _with_contiguous_rows(q), table.to(q.dtype), index)
    run = _ops.logits_bwd if support.fused(q, *problem) else _fallback.logits_bwd
    run(d_q, d_table, *operands, *work_spaces, *problem)
    return d_q, None if d_table is None else d_table.to(table.dtype)


class AttentionFunction(torch.autograd.Function):
    """``softmax(scale * q k^T + bias(q, table)) v`` and its log-sum-exp, which is None unless gradients are wanted."""

    @staticmethod
    def forward(
        q: Tensor,  # [B, heads, M, D] or [G, M, D]
        k: Tensor,  # [.., N, D]
        v: Tensor,
        table: Tensor,  # [rows, D]
        index: Tensor,
        q_size: tables.Grid,
        k_size: tables.Grid,
        num_prefix_tokens: int,
        scale: float,
        native: bool,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out = _empty_by_tokens(q)
        lse = None
        if wants_gradients:
            lse = torch.empty((math.prod(q.shape[:-2]), q.shape[-2]), dtype=accumulation_dtype(q), device=q.device)
        rows = [_with_contiguous_rows(t) for t in (q, k, v)]
        run = _ops.attention_fwd if native else _fallback_attention.attention_fwd
        run(out, lse, *rows, table.to(q.dtype), index, q_size, k_size, num_prefix_tokens, scale)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        q, k, v, table, index, *problem, wants_gradients = inputs
        out, lse = output
        ctx.problem = tuple(problem)
        if lse is not None:
            ctx.save_for_backward(q, k, v, table, index, out, lse)
            ctx.mark_non_differentiable(lse)
            ctx.set_materialize_grads(False)  # no zeros for lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        static = (ctx.problem, ctx.needs_input_grad[:4])
        return *_once(_attention_gradients, static, grad, *ctx.saved_tensors), *[None] * 7


def _attention_gradients(
    problem: tuple[Any, ...],
    needs: tuple[bool, ...],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of q, k, v and the table, as far as they are needed."""
    q_size, k_size, prefix, scale, native = problem
    d_q, d_k, d_v = (_empty_by_tokens(t) if n else None for t, n in zip((q, k, v), needs[:3], strict=True))
    d_table = torch.empty(table.shape, dtype=accumulation_dtype(q), device=q.device) if needs[3] else None
    work_spaces = (
        *_work_spaces(q, q_size, k_size, needs[3]),
        *_factor_cache(q, q_size, k_size, prefix, needs[1] or needs[2]),
    )
    rows = [_with_contiguous_rows(t) for t in (grad, q, k, v, out)]
    run = _ops.attention_bwd if native else _fallback_attention.attention_bwd
    run(d_q, d_k, d_v, d_table, *rows, lse, table.to(q.dtype), index, *work_spaces, q_size, k_size, prefix, scale)
    return d_q, d_k, d_v, None if d_table is None else d_table.to(table.dtype)


class _Once(torch.autograd.Function):
    """Gradients that are not differentiated again.

    A node that all they depend on leads to, so that whoever asks for a second derivative is refused. Those that
    `once_differentiable` marks are refused by the engine alone: torch.autograd.grad and torch.func find zeros there.
    """

    @staticmethod
    def forward(gradients: Gradients, static: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(*static, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError("relpos_cuda: second derivatives are not supported; relpos_cuda.reference has them")


def _once(gradients: Gradients, static: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph
        return _Once.apply(gradients, static, *tensors)
    return gradients(*static, *tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    index: Tensor,
    q_size: tables.Grid,
    k_size: tables.Grid,
    num_prefix_tokens: int,
    scale: float,
) -> Tensor:
    """The output alone; nothing is saved where no gradient can be asked for.

    Which path is taken is asked here: what torch.compile traces of a Function must not compare symbolic numbers of its
    outside, as ``scale`` may be one.
    """
    native = support.fused(q, q_size, k_size, num_prefix_tokens, "attention", scale)
    needs = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or table.requires_grad)
    needs = needs or is_transformed()
    inputs = (q, k, v, table, index, q_size, k_size, num_prefix_tokens, scale, native, needs)
    out, _ = apply(AttentionFunction, *inputs) if needs else AttentionFunction.forward(*inputs)
    return out


def _empty_by_tokens(like: Tensor) -> Tensor:
    """[B, heads, S, D] in the order of [B, S, heads, D]: what a Linear before or after reads without a copy."""
    if like.dim() == 3:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _, heads, tokens, head_dim = like.shape
    strides = tokens * heads * head_dim, head_dim, heads * head_dim, 1
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)


def _with_contiguous_rows(q: Tensor) -> Tensor:
    return q if q.stride(-1) == 1 or q.shape[-1] == 1 else q.contiguous()


def _dense(logits: Tensor) -> Tensor:
    """Logits as the kernels stream them; itself if it is contiguous."""
    return logits if logits.is_contiguous() else logits.contiguous()


def _work_spaces(
    q: Tensor, q_size: tables.Grid, k_size: tables.Grid, table_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the CUDA backward: the gradient of every factor, and the table gradient before its last, ordered sum."""
    if not table_gradient or not _needs_work_spaces(q):
        return None, None
    queries, head_dim = math.prod(q.shape[:-1]), q.shape[-1]
    pairs = sum(a * b for a, b in zip(q_size, k_size, strict=True))
    rows_per_coordinate = queries // max(q_size)
    splits = max(1, min(64, _TABLE_BLOCKS // sum(q_size), rows_per_coordinate // _QUERIES_PER_BLOCK))
    factors = torch.empty((queries, sum(k_size)), dtype=torch.float32, device=q.device)
    partials = torch.empty((splits, pairs, head_dim), dtype=torch.float32, device=q.device)
    return factors, partials


def _factor_cache(
    q: Tensor, q_size: tables.Grid, k_size: tables.Grid, num_prefix_tokens: int, key_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the CUDA backward: the factors, from the kernel that makes dq to the one that makes dk and dv.

    ``csrc/shared_attention.h`` says what is where; float16, not bfloat16, beside half precision q. None if one kernel
    makes them all.
    """
    if not key_gradient or not _needs_work_spaces(q):
        return None, None
    if support.backward_in_one_pass(q, q_size, k_size, num_prefix_tokens):
        return None, None
    groups, queries = math.prod(q.shape[:-2]), q.shape[-2]
    lines = math.prod(k_size[:-1]) + (num_prefix_tokens > 0) + (2 if q.dtype == torch.float32 else 1)
    dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    columns = torch.empty((groups, queries, _round_up(k_size[-1], 8)), dtype=dtype, device=q.device)
    return columns, torch.empty((groups, lines, _round_up(queries, 4)), dtype=torch.float32, device=q.device)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _needs_work_spaces(q: Tensor) -> bool:
    return q.is_cuda
