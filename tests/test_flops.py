"""What FlopCounterMode counts: forward as of the formula; backward, what is computed anew, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import relpos_cuda
from problems import Problem, call, call_attention, draw, draw_attention, same

PROBLEMS = [same("square", 4, 5, 8, batch=2), Problem("pooled_cls", (4, 6), (2, 3), 16, prefix=2)]


def flops_of(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_attention(problem: Problem):
    counted = []
    for module in (relpos_cuda, relpos_cuda.reference):
        leaves = draw_attention(problem, torch.float32).leaves(torch.float32)
        out = []
        forward = flops_of(lambda m=module, x=leaves, o=out: o.append(call_attention(m.rel_pos_attention, problem, x)))
        counted.append((forward, flops_of(lambda o=out: o[0].sum().backward())))
    ours, formula = counted
    groups, factors = problem.batch * problem.heads, ours[0]
    product = 2 * groups * problem.rows * problem.columns * problem.head_dim
    factors -= 2 * product
    assert ours[0] == formula[0] and factors > 0
    assert formula[1] == 4 * product + 2 * factors
    assert ours[1] == 5 * product + 3 * factors


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_logits(problem: Problem):
    counted = []
    for module in (relpos_cuda, relpos_cuda.reference):
        attn, q, *tables = draw(problem, torch.float32).leaves(torch.float32, "cpu")
        out = []
        forward = flops_of(
            lambda m=module, o=out, x=(attn, q, tables): o.append(call(m.add_decomposed_rel_pos, problem, *x))
        )
        counted.append((forward, flops_of(lambda o=out: o[0].sum().backward())))
    assert counted[0] == counted[1] and counted[0][0] > 0
