"""The PyTorch path: the same numbers, no tensor of size S x S beside the logits, one warning."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import relpos_cuda
from checks import assert_close_as_eager, assert_exact_as_float64
from problems import MODELS, NAMES, TINY, Problem, call, draw, run
from relpos_cuda import _fallback, _loader, _ops, reference, support

ours, eager = relpos_cuda.add_decomposed_rel_pos, reference.add_decomposed_rel_pos
SHARED_ROW = Problem("two_keys_share_a_row", (99, 1), (117, 2), 8, heads=1)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_ops, "logits_fwd", _fallback.logits_fwd)
    monkeypatch.setattr(_ops, "logits_bwd", _fallback.logits_bwd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", [*TINY, MODELS[0], MODELS[-1], SHARED_ROW], ids=str)
def test_same_numbers(problem: Problem, dtype: torch.dtype, real_device: str, without_kernels):
    inputs = draw(problem, dtype)
    exact = run(eager, problem, inputs, torch.float64)
    rival = run(eager, problem, inputs, dtype, real_device)
    for inplace in (False, True):
        got = run(ours, problem, inputs, dtype, real_device, inplace=inplace)
        for name, g, r, e in zip(NAMES, got, rival, exact, strict=False):
            assert_close_as_eager(g, r, e, name)


def test_no_groups(without_kernels):
    problem = Problem("empty", (2, 3), (2, 3), 8, batch=0)
    out, _, d_q, *d_tables = run(ours, problem, draw(problem, torch.float32), torch.float32)
    assert out.shape == (0, 2, 6, 6) and d_q.shape == (0, 2, 6, 8)
    assert not any(d.any() for d in d_tables)


@pytest.mark.parametrize("groups,side", [(64, 16), (1, 40)])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_no_copy_of_half_precision_logits(way: str, groups: int, side: int, monkeypatch: pytest.MonkeyPatch):
    """Summing in float32 must not make a float32 copy of them all, of many groups or of one."""
    grid, rows = [side, side], 2 * side - 1
    logits = torch.zeros(groups, side**2, side**2, dtype=torch.bfloat16)
    q, table = torch.zeros(groups, side**2, 8, dtype=torch.bfloat16), torch.zeros(2 * rows, 8, dtype=torch.bfloat16)
    index = relpos_cuda.tables.lookup((side, side), (side, side), torch.device("cpu"))
    dq, dtable = torch.empty_like(q), torch.empty(2 * rows, 8)
    monkeypatch.setattr(_fallback, "CHUNK_BYTES", 1 << 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if way == "forward":
            _fallback.logits_fwd(logits, None, q, table, index, grid, grid, 0)
        else:
            _fallback.logits_bwd(dq, dtable, logits, q, table, index, None, None, grid, grid, 0)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    factors = 4 * q.shape[:-1].numel() * side
    assert 0 < largest <= max(_fallback.CHUNK_BYTES, factors) < logits.numel()


@pytest.mark.parametrize("problem", TINY, ids=str)
def test_half_precision_logits_are_rounded_once(problem: Problem, without_kernels, monkeypatch: pytest.MonkeyPatch):
    """As by the kernels: of float32 sums, whatever the chunks."""
    attn, q, *tables = draw(problem, torch.bfloat16).leaves(torch.bfloat16, "cpu")
    want = call(ours, problem, attn.float(), q, tables).bfloat16()
    for rows_of_a_chunk in (1, 3, 10**6):
        monkeypatch.setattr(_fallback, "CHUNK_BYTES", 4 * problem.columns * rows_of_a_chunk)
        assert torch.equal(call(ours, problem, attn, q, tables), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_that_share_a_row_on_the_cpu_kernel(dtype: torch.dtype):
    inputs = draw(SHARED_ROW, dtype)
    exact, rival = (run(eager, SHARED_ROW, inputs, d) for d in (torch.float64, dtype))
    for name, g, r, e in zip(NAMES, run(ours, SHARED_ROW, inputs, dtype), rival, exact, strict=False):
        if dtype == torch.float64:
            assert_exact_as_float64(g, e, name)
        else:
            assert_close_as_eager(g, r, e, name)


def test_one_warning_says_why():
    support.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        support.warn_once("reason one")
        support.warn_once("reason one")
        support.warn_once("reason two")
    assert [str(w.message) for w in caught] == [
        "relpos_cuda: using the slower PyTorch path: reason one",
        "relpos_cuda: using the slower PyTorch path: reason two",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype, without_kernels):
    """Inside the op nothing is rounded to autocast's dtype: einsum and matmul would be."""
    problem = TINY[0]
    inputs = draw(problem, dtype)
    exact, rival = (run(eager, problem, inputs, d) for d in (torch.float64, dtype))
    leaves = inputs.leaves(dtype, "cpu")
    out, q = (t.detach().clone() for t in leaves[:2])
    index = relpos_cuda.tables.lookup(problem.q_size, problem.k_size, out.device)
    table = torch.cat([t.detach() for t in leaves[2:]])
    with torch.autocast("cpu", dtype=torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        _fallback.logits_fwd(out, None, q, table, index, problem.q_size, problem.k_size, 0)
    assert_close_as_eager(out, rival[0], exact[0], "out")


def test_a_library_without_a_kernel_of_that_name(monkeypatch: pytest.MonkeyPatch):
    """The library is there and the op still has no kernel: the PyTorch path, not the same call for ever."""
    monkeypatch.setattr(_loader, "load", lambda kind: True)
    monkeypatch.setattr(_ops, "has_kernel", lambda name, device: False)
    support.refusal.cache_clear()
    q, table = torch.randn(1, 6, 8), torch.zeros(5, 8)
    try:
        assert "no attention kernel" in relpos_cuda.is_supported(q, (2, 3), (2, 3), op="attention")
        out = relpos_cuda.rel_pos_attention(q, q, q, table, table, (2, 3), (2, 3))
    finally:
        support.refusal.cache_clear()
    torch.testing.assert_close(out, (q * 8**-0.5 @ q.mT).softmax(-1) @ q)


PICKS_UP = """
import warnings
import torch, relpos_cuda
from relpos_cuda import _fallback_attention, _loader, support
q, table = torch.randn(1, 6, 8), torch.zeros(5, 8)
assert not relpos_cuda._ops.has_kernel("attention_fwd", "cpu")
calls = []

def load(kind):
    if not calls:  # the library comes with the first call, and with it the kernel
        calls.append("loaded")
        torch.library.impl("relpos_cuda::attention_fwd", "CPU", func=kernel, lib=library)
    return True

def kernel(*args):
    calls.append("kernel")
    _fallback_attention.attention_fwd(*args)

library = torch.library.Library("relpos_cuda", "IMPL")
_loader.load = load
warnings.simplefilter("error")
for _ in range(2):
    relpos_cuda.rel_pos_attention(q, q, q, table, table, (2, 3), (2, 3))
assert calls == ["loaded", "kernel", "kernel"], calls
assert relpos_cuda.is_supported(q, (2, 3), (2, 3), op="attention") is None
"""


def test_a_kernel_is_picked_up_as_soon_as_there_is_one():
    done = subprocess.run([sys.executable, "-c", PICKS_UP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_attention_says_once_why_it_is_slow(real_device: str):
    q, table = torch.zeros(1, 6, 8, device=real_device), torch.zeros(5, 8, device=real_device)
    reason = relpos_cuda.is_supported(q, (2, 3), (2, 3), op="attention")
    assert relpos_cuda.is_supported(q, (2, 3), (2, 3)) is None
    support.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            relpos_cuda.rel_pos_attention(q, q, q, table, table, (2, 3), (2, 3))
    expected = [f"relpos_cuda: using the slower PyTorch path: {reason}"] if reason else []
    assert [str(w.message) for w in caught] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_float64_on_the_gpu():
    problem = TINY[0]
    inputs = draw(problem, torch.float64)
    support.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="float64 has no CUDA kernel"):
        got = run(ours, problem, inputs, torch.float64, "cuda")
    for g, e in zip(got, run(eager, problem, inputs, torch.float64), strict=True):
        torch.testing.assert_close(g.cpu(), e)
