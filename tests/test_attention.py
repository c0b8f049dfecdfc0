"""rel_pos_attention: values, every gradient, layouts, extremes, determinism, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import relpos_cuda
from checks import assert_close_as_eager, assert_exact_as_float64, assert_vanishes, compare_attention
from conftest import use_device, use_pytorch
from problems import (
    ATTENTION_NAMES,
    EXTREMES,
    MODELS,
    TINY,
    AttentionInputs,
    Problem,
    call_attention,
    draw_attention,
    run_attention,
    same,
    vanishes,
    with_enough_numbers,
)
from relpos_cuda import _fallback, _ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.bfloat16, torch.float16]
ours, eager = relpos_cuda.rel_pos_attention, reference.rel_pos_attention

PROBLEMS = [
    *map(with_enough_numbers, TINY),
    Problem("many_spans", (2, 3), (2, 300), 8, batch=4, heads=2, prefix=1),
    Problem("spans_of_three_blocks", (2, 3), (3, 20), 16, batch=4),  # and two blocks of a tile unused
    Problem("two_spans_of_40", (2, 5), (3, 76), 40, batch=2, heads=1, prefix=2),
]
# Fewer heads: the float64 reference is what takes the time.
SOME_MODELS = [
    same("sam_b_window", 14, 14, 64, batch=2, heads=1),
    same("sam_h_window", 14, 14, 80, heads=2),
    same("global_20_interpolated", 20, 20, 64, heads=1, table=127),
    Problem("mvitv2_stage2_cls", (28, 28), (7, 7), 96, heads=1, prefix=1),
    Problem("video_cls", (4, 7, 7), (4, 7, 7), 96, heads=1, prefix=1),
    *(p for p in MODELS if p.name in ("slimsam_window", "mvitv2_large_cls", "slowfast_fraction")),
]


@pytest.fixture(params=["cpu", "pytorch", "emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As that of conftest.py, and the PyTorch path on the CPU."""
    return use_device(request.param, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_tiny_problems(problem: Problem, dtype: torch.dtype, device: str, request: pytest.FixtureRequest):
    if problem.columns > 10000 and request.node.callspec.params["device"] == "emulated":
        pytest.skip("takes minutes in the emulator; many_spans is like it")
    compare_attention(problem, draw_attention(problem, dtype), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("problem", SOME_MODELS, ids=str)
def test_models(problem: Problem, dtype: torch.dtype, device: str):
    compare_attention(problem, draw_attention(problem, dtype), dtype, device)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1, 2.5])
def test_scale(scale: float, device: str):
    problem = same("scale", 4, 5, 16)
    compare_attention(problem, draw_attention(problem, torch.float32), torch.float32, device, scale=scale)


@pytest.mark.parametrize("problem", [*PROBLEMS, SOME_MODELS[0]], ids=str)
def test_float64(problem: Problem, device: str):
    inputs = draw_attention(problem, torch.float64)
    exact = run_attention(eager, problem, inputs, torch.float64)
    got = run_attention(ours, problem, inputs, torch.float64, device)
    for name, g, e in zip(ATTENTION_NAMES, got, exact, strict=False):
        if vanishes(problem, name):
            assert_vanishes(g, e, exact, name)
        else:
            assert_exact_as_float64(g, e, name)


@pytest.mark.parametrize("chunk", [None, 1, 1 << 20])
@pytest.mark.parametrize(
    "problem", [Problem("small", (2, 2), (3, 1), 3, prefix=1), Problem("video", (2, 1, 1), (1, 2, 3), 2)], ids=str
)
def test_gradcheck(problem: Problem, chunk: int | None, monkeypatch: pytest.MonkeyPatch):
    """Of the native kernels, and of the PyTorch path with chunks of a row and of everything."""
    if chunk is not None:
        use_pytorch(monkeypatch)
        monkeypatch.setattr(_fallback, "CHUNK_BYTES", chunk)
    leaves = draw_attention(problem, torch.float64).leaves(torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: call_attention(ours, problem, list(tensors), scale=0.7), leaves)


def test_lse(device: str):
    problem = Problem("lse", (4, 5), (2, 3), 16, batch=2, heads=3, prefix=1)
    q, k, v, *tables = (t.detach() for t in draw_attention(problem, torch.float32).leaves(torch.float32, device))
    grids = (problem.q_size, problem.k_size)
    table, index = relpos_cuda.tables.stack(tables, *grids), relpos_cuda.tables.lookup(*grids, q.device)
    lse = torch.empty(6, 21, device=device)
    _ops.attention_fwd(torch.empty_like(q), lse, q, k, v, table, index, *grids, 1, 0.3)
    logits = reference.add_decomposed_rel_pos(0.3 * q @ k.mT, q, *tables, *grids, num_prefix_tokens=1)
    torch.testing.assert_close(lse, logits.logsumexp(-1).flatten(0, 1))


# ---- extremes


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("extreme,grid", [*zip(EXTREMES, [(8, 9), (6, 7), (8, 9)], strict=True)])
def test_extremes(extreme: Callable[[AttentionInputs], None], grid: tuple[int, int], dtype: torch.dtype, device: str):
    problem = with_enough_numbers(same("extreme", *grid, 16))
    inputs = draw_attention(problem, dtype)
    extreme(inputs)
    compare_attention(problem, inputs, dtype, device)


@pytest.mark.parametrize("grid", [(14, 14), (5, 40), (9, 20)], ids=str)
def test_bias_beyond_float16(grid: tuple[int, int], device: str):
    """Lines of keys so far below the largest that half precision has no number for them, the first among them.

    All weight is on one key, or two: the output is a value. Eager, in half precision, often takes another's.
    """
    problem = same("far", *grid, 16, batch=2)
    inputs = draw_attention(problem, torch.bfloat16)
    inputs.tensors[0] = (1e4 * inputs.tensors[0]).bfloat16().double()
    exact = call_attention(eager, problem, inputs.tensors)
    rival, got = (call_attention(f, problem, inputs.leaves(torch.bfloat16, device)) for f in (eager, ours))
    of_rival, of_ours = ((t.detach().cpu().double() - exact).abs() for t in (rival, got))
    assert got.isfinite().all()
    assert (of_ours > 0.1).sum() <= (of_rival > 0.1).sum() and of_ours.mean() <= of_rival.mean()


def test_logits_beyond_float16(device: str):
    """They overflow in eager half precision; in float32 sums they do not."""
    problem = same("beyond", 4, 5, 16)
    inputs = draw_attention(problem, torch.float16)
    for t in inputs.tensors[:2]:
        t *= 256
    exact = run_attention(eager, problem, inputs, torch.float64)
    rival = run_attention(eager, problem, inputs, torch.float16, device)
    got = run_attention(ours, problem, inputs, torch.float16, device)
    assert not torch.isfinite(rival[0]).all()
    assert all(torch.isfinite(g).all() for g in got)
    torch.testing.assert_close(got[0].cpu().double(), exact[0], rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("axis", [0, 1], ids=["lines", "columns"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_added_to_a_whole_table_costs_no_precision(axis: int, dtype: torch.dtype, device: str):
    """A vector c added to every row of a table adds q c to all logits of a query: softmax and gradients are the same.

    But that of q, which has c times a sum of rounded numbers that would be zero.
    """
    problem = with_enough_numbers(same("shifted", 6, 7, 32))
    inputs = draw_attention(problem, dtype)
    for table in inputs.tensors[3:]:
        table.copy_((table * 16).round() / 4)  # with c, still a number of 8 bits
    exact = run_attention(eager, problem, inputs, torch.float64)
    rival = run_attention(eager, problem, inputs, dtype, device)
    inputs.tensors[3 + axis] += 24 * torch.randn(32, generator=torch.Generator().manual_seed(0)).sign()
    got = run_attention(ours, problem, inputs, dtype, device)
    for name, *results in zip(ATTENTION_NAMES, got, rival, exact, strict=False):
        if name != "q":
            assert_close_as_eager(*results, name)


# ---- gradients, determinism, memory


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [0, 2], [1, 3], [2, 4]])
def test_only_the_gradients_that_are_asked_for(wanted: list[int], device: str, monkeypatch: pytest.MonkeyPatch):
    problem = same("some", 4, 5, 16)
    inputs = draw_attention(problem, torch.float32)
    every = run_attention(ours, problem, inputs, torch.float32, device)[1:]
    leaves = inputs.leaves(torch.float32, device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    asked = []
    original = _ops.attention_bwd
    monkeypatch.setattr(_ops, "attention_bwd", lambda *args: (asked.append(args[:4]), original(*args)))
    out = call_attention(ours, problem, leaves)
    got = torch.autograd.grad(out, [leaves[i] for i in wanted], inputs.grad.to(device, torch.float32))
    assert all(torch.equal(g, every[i]) for g, i in zip(got, wanted, strict=True))
    assert [t is not None for t in asked[0]] == [0 in wanted, 1 in wanted, 2 in wanted, bool({3, 4} & set(wanted))]


@pytest.mark.parametrize("problem", [TINY[0], TINY[-1], *SOME_MODELS[:2]], ids=str)
def test_bitwise_the_same_on_every_run(problem: Problem, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_fallback, "CHUNK_BYTES", 4 * problem.columns * (problem.rows // 5))
    inputs = draw_attention(problem, torch.float32)
    torch.set_num_threads(2)
    results = [run_attention(ours, problem, inputs, torch.float32, device) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_saved(device: str, monkeypatch: pytest.MonkeyPatch):
    wants_lse = []
    original = _ops.attention_fwd
    monkeypatch.setattr(_ops, "attention_fwd", lambda *args: (wants_lse.append(args[1] is not None), original(*args)))
    problem = same("saved", 16, 16, 16)
    leaves = draw_attention(problem, torch.float32).leaves(torch.float32, device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        call_attention(ours, problem, leaves)
        assert max(saved) == leaves[0].numel() and leaves[0].shape[1] * 256 in saved  # q, k, v, out and lse
        saved.clear()
        with torch.no_grad():
            call_attention(ours, problem, leaves)
        call_attention(ours, problem, [t.detach() for t in leaves])
    assert not saved and wants_lse == [True, False, False]


@pytest.mark.parametrize("batch,heads", [(0, 2), (2, 0)])
def test_no_groups(batch: int, heads: int, device: str):
    problem = same("empty", 3, 4, 8, batch=batch, heads=heads)
    out, *grads = run_attention(ours, problem, draw_attention(problem, torch.float32), torch.float32, device)
    assert out.shape == (batch, heads, 12, 8)
    assert all(d.shape == (batch, heads, 12, 8) for d in grads[:3])
    assert not any(d.any() for d in grads[3:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_threads_launch_one_kernel_with_more_and_with_less_shared_memory():
    """What a kernel may have is told to the driver, once for all threads of the process."""

    def attend(lines: int) -> None:
        q = torch.zeros(1, 2, lines * 64, 64, dtype=torch.bfloat16, device="cuda")
        table = torch.zeros(127, 64, dtype=torch.bfloat16, device="cuda")
        for _ in range(300):
            relpos_cuda.rel_pos_attention(q, q, q, table, table, (lines, 64), (lines, 64))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attend, (8, 128)))
