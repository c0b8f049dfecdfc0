"""add_decomposed_rel_pos: determinism, memory, sizes."""

from __future__ import annotations

import math

import pytest
import torch

import relpos_cuda
from checks import assert_close_as_eager
from problems import MODELS, TINY, Problem, call, draw, run, same
from relpos_cuda import reference
from test_logits import compare

ours = relpos_cuda.add_decomposed_rel_pos


@pytest.mark.parametrize("problem", [TINY[0], TINY[7], MODELS[0], MODELS[8], MODELS[14]], ids=str)
def test_bitwise_deterministic_whatever_the_threads(problem: Problem, real_device: str):
    inputs = draw(problem, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1, 3, threads):
            torch.set_num_threads(count)
            results.append(run(ours, problem, inputs, torch.float32, real_device))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_of_logits_size_is_saved(real_device: str):
    problem = same("saved", 16, 16, 16)
    leaves = draw(problem, torch.float32).leaves(torch.float32, real_device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        call(ours, problem, leaves[0], leaves[1], leaves[2:])
    assert saved and max(saved) <= leaves[1].numel()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batch,heads", [(0, 2), (2, 0)])
def test_no_groups(batch: int, heads: int, inplace: bool, device: str):
    problem = same("empty", 3, 4, 8, batch=batch, heads=heads)
    inputs = draw(problem, torch.float32)
    out, d_attn, d_q, *d_tables = run(ours, problem, inputs, torch.float32, device, inplace=inplace)
    assert out.shape == d_attn.shape == (batch, heads, 12, 12)
    assert d_q.shape == (batch, heads, 12, 8)
    assert all(torch.equal(d, torch.zeros_like(d)) for d in d_tables)


def test_class_tokens_are_left_alone(device: str):
    problem = same("cls", 4, 4, 16, prefix=2)
    leaves = draw(problem, torch.float32).leaves(torch.float32, device)
    out = call(ours, problem, leaves[0], leaves[1], leaves[2:])
    assert torch.equal(out[..., :2, :], leaves[0][..., :2, :])
    assert torch.equal(out[..., :2], leaves[0][..., :2])


def test_heads_wider_than_a_block(device: str):
    """The table's sum has 512 threads, one per element."""
    compare(same("wide", 2, 3, 520, batch=1, heads=1), torch.bfloat16, device)


def test_unused_table_rows_get_no_gradient(device: str):
    problem = Problem("unused", (8, 8), (2, 2), 16)  # uses rows 0 .. 11 of 15
    grads = run(ours, problem, draw(problem, torch.float32), torch.float32, device)
    used = set(relpos_cuda.tables.index(8, 2).flatten().tolist())
    for d_table in grads[3:5]:
        zero = {r for r in range(15) if not d_table[r].any()}
        assert zero == set(range(15)) - used


@pytest.mark.slow
def test_more_logits_than_int32_counts():
    """An offset that wraps would add the bias elsewhere."""
    grid, head_dim = (216, 216), 8
    tokens = math.prod(grid)
    assert tokens**2 > 2**31
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, tokens, head_dim, generator=generator).bfloat16()
    tables = [torch.randn(2 * n - 1, head_dim, generator=generator).bfloat16() for n in grid]
    attn = torch.zeros(1, tokens, tokens, dtype=torch.bfloat16)
    ours(attn, q, *tables, grid, grid, inplace=True)
    exact, rival = (
        reference.decomposed_rel_pos(q.to(dtype), *(t.to(dtype) for t in tables), grid, grid)
        for dtype in (torch.float64, torch.bfloat16)
    )
    for row in (0, 1, tokens // 2, tokens - 1):
        e, r = ((rel_h[0, row, :, None] + rel_w[0, row]).flatten() for rel_h, rel_w in (exact, rival))
        assert_close_as_eager(attn[0, row], r, e, f"row {row}")
