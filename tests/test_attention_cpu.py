"""The attention ops on the CPU: against the formula in float64, with eager in the same dtype as the rival."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import relpos_cuda
from checks import assert_close_as_eager, assert_exact_as_float64, assert_vanishes, miss
from problems import ATTENTION_NAMES as NAMES
from problems import (
    MODELS,
    NO_WORK_SPACES,
    TINY,
    AttentionInputs,
    Problem,
    call,
    draw_attention,
    run_attention,
    same,
    vanishes,
    with_enough_numbers,
)
from relpos_cuda import _loader, _ops, reference, tables
from test_isa import ISAS, has

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEVERAL_MODELS = [
    dataclasses.replace(p, batch=1, heads=min(p.heads, 2)) for p in MODELS if "global" not in p.name and p.rows < 4000
]
# One strip and several, blocks of keys that end within image rows, few and many groups.
SHAPES = [
    same("blocks_cut_rows", 25, 29, 24),
    same("one_group", 28, 28, 32, heads=1),
    same("more_groups_than_slices", 3, 3, 8, batch=13, heads=10),
    Problem("many_class_tokens", (3, 5), (4, 4), 16, prefix=70),
    Problem("class_tokens_fill_blocks", (4, 4), (4, 4), 8, prefix=700),
]


def draw(problem: Problem, dtype: torch.dtype) -> AttentionInputs:
    """With tables of the length that needs no interpolation: the ops know none."""
    return draw_attention(dataclasses.replace(problem, table=None), dtype)


def formula(p: Problem, inputs: AttentionInputs, dtype: torch.dtype) -> list[Tensor]:
    return run_attention(reference.rel_pos_attention, p, inputs, dtype)


def stacked(inputs: AttentionInputs) -> list[Tensor]:
    """The tables in the order of the ops: t, h, w."""
    return [*inputs.tensors[5:], *inputs.tensors[3:5]]


def empty(p: Problem, tokens: int, dtype: torch.dtype, strided: bool) -> Tensor:
    """Filled with what must not remain. Strided: [B, heads, S, D] in the memory of [B, S, 3, heads, D]."""
    if not strided:
        return torch.full((p.batch, p.heads, tokens, p.head_dim), float("nan"), dtype=dtype)
    packed = torch.full((p.batch, tokens, 3, p.heads, p.head_dim), float("nan"), dtype=dtype)
    return packed.permute(2, 0, 3, 1, 4)[1]


def ops(p: Problem, inputs: AttentionInputs, dtype: torch.dtype, strided: bool = False) -> list[Tensor]:
    """The same through the ops."""

    def operand(t: Tensor) -> Tensor:
        return empty(p, t.shape[-2], dtype, strided).copy_(t)

    q, k, v, grad = (operand(t) for t in (*inputs.tensors[:3], inputs.grad))
    table = torch.cat(stacked(inputs)).to(dtype)
    index = tables.lookup(p.q_size, p.k_size, q.device)
    out = empty(p, p.rows, dtype, strided)
    wide = torch.promote_types(dtype, torch.float32)
    lse = torch.full((p.batch * p.heads, p.rows), float("nan"), dtype=wide)
    problem = (p.q_size, p.k_size, p.prefix, p.head_dim**-0.5)
    _ops.attention_fwd(out, lse, q, k, v, table, index, *problem)
    dq, dk, dv = (empty(p, n, dtype, strided) for n in (p.rows, p.columns, p.columns))
    d_table = torch.full(table.shape, float("nan"), dtype=wide)
    _ops.attention_bwd(dq, dk, dv, d_table, grad, q, k, v, out, lse, table, index, *NO_WORK_SPACES, *problem)
    d_tables = list(d_table.to(dtype).split([len(t) for t in stacked(inputs)]))
    return [out, dq, dk, dv, *d_tables[-2:], *d_tables[:-2]]


def compare(p: Problem, dtype: torch.dtype, strided: bool = False) -> None:
    inputs = draw(p, dtype)
    exact, rival, got = formula(p, inputs, torch.float64), formula(p, inputs, dtype), ops(p, inputs, dtype, strided)
    for name, g, r, e in zip(NAMES, got, rival, exact, strict=False):
        if vanishes(p, name):
            assert_vanishes(g, e, exact, name)
        else:
            assert_close_as_eager(g, r, e, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [*map(with_enough_numbers, SHAPES)], ids=str)
def test_at_most_twice_the_error_of_eager(problem: Problem, dtype: torch.dtype):
    compare(problem, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SEVERAL_MODELS, ids=str)
def test_models(problem: Problem, dtype: torch.dtype):
    compare(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [TINY[0], SHAPES[0], SHAPES[3]], ids=str)
def test_packed_views(problem: Problem, dtype: torch.dtype):
    inputs = draw(problem, dtype)
    for name, dense, packed in zip(NAMES, ops(problem, inputs, dtype), ops(problem, inputs, dtype, True), strict=False):
        assert packed.equal(dense), name


@pytest.mark.parametrize("problem", SHAPES, ids=str)
def test_float64(problem: Problem):
    inputs = draw(problem, torch.float64)
    exact, got = formula(problem, inputs, torch.float64), ops(problem, inputs, torch.float64)
    for name, g, e in zip(NAMES, got, exact, strict=False):
        assert_exact_as_float64(g, e, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse(dtype: torch.dtype):
    p = SHAPES[3]
    inputs = draw(p, dtype)
    exact_q, exact_k, _, *rel_pos = inputs.tensors
    q, k, v = (t.to(dtype) for t in inputs.tensors[:3])
    lse, out = torch.empty(p.batch * p.heads, p.rows), torch.empty_like(q)
    index = tables.lookup(p.q_size, p.k_size, q.device)
    problem = (torch.cat(rel_pos).to(dtype), index, p.q_size, p.k_size, p.prefix, 0.3)
    _ops.attention_fwd(out, lse, q, k, v, *problem)
    logits = call(reference.add_decomposed_rel_pos, p, 0.3 * exact_q @ exact_k.mT, exact_q, rel_pos)
    exact = logits.logsumexp(-1).flatten(0, 1)
    assert miss(lse, exact) <= 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    without = torch.empty_like(out)
    _ops.attention_fwd(without, None, q, k, v, *problem)
    assert without.equal(out)


def gradients(p: Problem, inputs: AttentionInputs, wanted: list[bool]) -> list[Tensor | None]:
    q, k, v, grad = (t.float() for t in (*inputs.tensors[:3], inputs.grad))
    table = torch.cat(stacked(inputs)).float()
    rest = (table, tables.lookup(p.q_size, p.k_size, q.device), p.q_size, p.k_size, p.prefix, 0.2)
    out, lse = torch.empty_like(q), torch.empty(p.batch * p.heads, p.rows)
    _ops.attention_fwd(out, lse, q, k, v, *rest)
    into = [torch.full_like(t, float("nan")) if w else None for t, w in zip((q, k, v, table), wanted, strict=True)]
    _ops.attention_bwd(*into, grad, q, k, v, out, lse, *rest[:2], *NO_WORK_SPACES, *rest[2:])
    return into


@pytest.mark.parametrize("one", range(4))
def test_one_gradient_alone(one: int):
    p = SHAPES[0]
    inputs = draw(p, torch.float32)
    alone = gradients(p, inputs, [i == one for i in range(4)])[one]
    assert alone.equal(gradients(p, inputs, [True] * 4)[one])


@pytest.mark.parametrize("problem", [TINY[0], *SHAPES[:3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_luck(problem: Problem, dtype: torch.dtype):
    inputs = draw(problem, dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(ops(problem, inputs, dtype))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, a, b in zip(NAMES, runs[0], other, strict=False):
            assert a.equal(b), name


@pytest.mark.parametrize("size", [1e1, 1e2, 1e4, 1e9])
@pytest.mark.parametrize("problem", [same("one_block", 14, 14, 24, batch=8), SHAPES[0]], ids=str)
def test_large_logits(problem: Problem, size: float):
    """Rows that are one-hot to the last bit, exponents far below the smallest number, and a key far ahead of others.

    Where all keys are one block, everything is as good as eager. Else p is only as good as lse, a large number in
    float32, and delta as out: some gradients miss more where the logits are in the hundreds.
    """
    inputs = draw(problem, torch.float32)
    q, k = inputs.tensors[:2]
    q *= size
    if size > 1e1:
        k[..., 3, :] = q.sum(-2).float()
    exact, rival = formula(problem, inputs, torch.float64), formula(problem, inputs, torch.float32)
    got = ops(problem, inputs, torch.float32)
    one_block = problem.columns < 640
    for name, g, r, e in list(zip(NAMES, got, rival, exact, strict=False))[: None if one_block else 1]:
        if e.any():
            assert_close_as_eager(g, r, e, name)
        else:
            assert_vanishes(g, e, exact, name)
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits_of_a_key(dtype: torch.dtype):
    """It has no part in the result. A strip of one query: what is beside it in its vector is no number."""
    p = same("one_more_than_a_strip", 5, 13, 16, batch=4)
    inputs = draw(p, dtype)
    q, k, _, *rel_pos = inputs.tensors
    q[..., 0] = q[..., 0].abs() + 1
    k[..., 7, 0] = -float("inf")
    for table in rel_pos:
        table[:, 0] = 0
    exact, rival, got = formula(p, inputs, torch.float64), formula(p, inputs, dtype), ops(p, inputs, dtype)
    for i in (0, 3):  # 0 * inf is in the others
        assert_close_as_eager(got[i], rival[i], exact[i], NAMES[i])


def test_a_query_with_a_nan_spoils_no_other():
    p = same("ends", 5, 13, 16, heads=1)
    inputs = draw(p, torch.float32)
    clean = ops(p, inputs, torch.float32)[0]
    inputs.tensors[0][..., 3, 2] = float("nan")
    spoilt = ops(p, inputs, torch.float32)[0]
    assert spoilt[..., 3, :].isnan().all()
    spoilt[..., 3, :] = clean[..., 3, :]
    assert spoilt.equal(clean)


def test_no_groups():
    p = dataclasses.replace(TINY[0], batch=0)
    inputs = draw(p, torch.float32)
    assert [t.numel() for t in ops(p, inputs, torch.float32)[:4]] == [0] * 4
    assert not any(t.any() for t in ops(p, inputs, torch.float32)[4:])


def test_refusals():
    p = TINY[0]
    inputs = draw(p, torch.float32)
    q, k, v = (t.float() for t in inputs.tensors[:3])
    lse = torch.empty(p.batch * p.heads, p.rows)
    rest = (torch.cat(stacked(inputs)).float(), tables.lookup(p.q_size, p.k_size, q.device), p.q_size, p.k_size, 0, 1.0)
    for wrong, words in [
        ((q, lse, q, k[:, :, 1:], v, *rest), "k must have 65 tokens"),
        ((q, lse, q, k, v[..., :7], *rest), "head dimension"),
        ((q, lse, q, k.double(), v, *rest), "k is float64"),
        ((q, lse[:, 1:], q, k, v, *rest), "lse must have"),
        ((q[:1], lse, q, k, v, *rest), "out must have size 2"),
        ((q, lse, q, k.mT.contiguous().mT, v, *rest), "last axis of k"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _ops.attention_fwd(*wrong)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str):
    if not has(isa):
        pytest.skip(f"this processor has no {isa}")
    package = Path(relpos_cuda.__file__).parent.parent
    environment = os.environ | {"RELPOS_CUDA_CPU_ISA": isa, "PYTHONPATH": str(package)}
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, str(len(DTYPES) * len(TINY + SHAPES))]


def main() -> None:
    """In a process of its own, because the instruction set is chosen once."""
    import ctypes

    assert _loader.load("cpu")
    library = ctypes.CDLL(str(_loader.status()["cpu"].path))
    library.relpos_cuda_cpu_isa.restype = ctypes.c_char_p
    for problem in TINY + SHAPES:
        for dtype in DTYPES:
            compare(with_enough_numbers(problem), dtype)
    print(library.relpos_cuda_cpu_isa().decode(), len(DTYPES) * len(TINY + SHAPES))


if __name__ == "__main__":
    main()
