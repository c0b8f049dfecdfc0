"""Windows have CUDA kernels of their own: values, every gradient, and that it is these kernels that run."""

from __future__ import annotations

import functools

import pytest
import torch

import emulator
import relpos_cuda
from checks import assert_close_as_eager, compare_attention, cuda_kernels
from conftest import use_device
from problems import ATTENTION_NAMES, EXTREMES, Problem, call_attention, draw_attention, run_attention, same
from relpos_cuda import _loader, _ops, support

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WINDOWS = [
    same("sam_b_window", 14, 14, 64),
    same("sam_h_window", 14, 14, 80, heads=1),
    same("widest_16x16", 16, 16, 64, heads=1),
    same("odd_lines_13x13", 13, 13, 48, heads=1),
    same("one_line_1x9", 1, 9, 8, batch=4),
    same("interpolated", 5, 12, 40, table=27),
    Problem("one_pass", (3, 7), (14, 14), 24),
    Problem("finer_queries", (8, 12), (6, 10), 16),
    Problem("fraction", (9, 10), (5, 9), 72),
    Problem("video", (2, 3, 11), (3, 4, 11), 32),
    Problem("finer_lines_coarser_columns", (8, 6), (4, 12), 32),
    Problem("few_queries", (3, 5), (9, 15), 64),
    Problem("finer_by_a_fraction", (7, 10), (5, 9), 16),
]
FORWARD = [  # of what the backward takes no window
    same("line_of_8", 7, 8, 64),
    same("window_7x7", 7, 7, 96, heads=1),
    same("column_9x1", 9, 1, 16, batch=2),
    Problem("class_token", (4, 5), (5, 14), 40, batch=2, prefix=1),
    Problem("class_tokens_fill_a_step", (3, 4), (3, 5), 16, prefix=37),
    Problem("mvitv2", (9, 15), (7, 7), 96, heads=1, prefix=1),
    Problem("mvitv2_stage2", (14, 8), (7, 4), 96, heads=1),
    same("mvitv2_stage3", 14, 14, 96, heads=1),
    Problem("many_queries", (20, 30), (3, 10), 8, heads=1),
    Problem("four_queries_per_key", (8, 36), (2, 9), 24, prefix=1),
    Problem("video_and_class_token", (2, 3, 4), (2, 3, 5), 24, prefix=1, table=9),
]
NO_WINDOWS = [  # small lines, all the same
    same("too_many_keys_36x9", 36, 9, 16, heads=1),
    Problem("too_many_and_class_tokens", (5, 8), (24, 14), 32, heads=1, prefix=3),
    Problem("too_many_of_a_video", (1, 2, 5), (6, 8, 7), 24, heads=1),
    same("dim_112", 3, 5, 112),
]
SMALL = [p for p in WINDOWS if p.rows < 100 and p.head_dim <= 64]
ours, eager = relpos_cuda.rel_pos_attention, relpos_cuda.reference.rel_pos_attention


@pytest.fixture(params=["emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(emulator.ARCH, "90")  # whose shared memory has room for all of them
    return use_device(request.param, monkeypatch)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every call of the backward; that without a cache is the one."""
    calls: list[int] = []
    original, columns = _ops.attention_bwd, 14
    monkeypatch.setattr(
        _ops, "attention_bwd", lambda *args: (calls.append(1 if args[columns] is None else 2), original(*args))
    )
    return calls


def fits(problem: Problem, device: str) -> bool:
    q = torch.empty(1, 1, 1, problem.head_dim, dtype=torch.float16, device=device)
    return support.backward_in_one_pass(q, problem.q_size, problem.k_size, problem.prefix)


def forward_is_of_windows(problem: Problem, dtype: torch.dtype, device: str) -> bool:
    call = functools.partial(call_attention, ours, problem, draw_attention(problem, dtype).leaves(dtype, device))
    if device == "cuda":
        return any("attention_fwd_window" in name for name in cuda_kernels(call))
    sizes = (problem.batch * problem.heads, problem.q_size, problem.k_size, problem.head_dim, problem.prefix)
    name = str(dtype).removeprefix("torch.")
    plan = _loader.plan().plan_attention("forward_window", name, *sizes, 90, problem.head_dim**-0.5)
    return bool(emulator.count("block_barriers", call) == 3 * plan.grid)  # any other has more


@HALVES
@pytest.mark.parametrize("problem", [*WINDOWS, *FORWARD, *NO_WINDOWS], ids=str)
def test_forward(problem: Problem, dtype: torch.dtype, device: str):
    if problem not in WINDOWS:  # their values: below
        compare_attention(problem, draw_attention(problem, dtype), dtype, device)
    if device == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10):  # there is room for all of them
        assert forward_is_of_windows(problem, dtype, device) == (problem not in NO_WINDOWS)


@HALVES
@pytest.mark.parametrize("problem", WINDOWS, ids=str)
def test_windows(problem: Problem, dtype: torch.dtype, device: str, passes: list[int]):
    if device == "cuda" and not fits(problem, device):
        pytest.skip("this GPU has too little shared memory for it")
    compare_attention(problem, draw_attention(problem, dtype), dtype, device)
    assert passes == [1]


@HALVES
@pytest.mark.parametrize("problem", [same("sam_b_window", 14, 14, 64), same("mvitv2_stage3", 14, 14, 96)], ids=str)
def test_where_the_table_does_not_fit(problem: Problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Beside keys, values and queries: of these, sm_80 has room for less than sm_90."""
    monkeypatch.setenv(emulator.ARCH, "80")
    compare_attention(problem, draw_attention(problem, dtype), dtype, use_device("emulated", monkeypatch))


@HALVES
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_two_kernels_take_windows_too(
    problem: Problem, dtype: torch.dtype, device: str, passes: list[int], monkeypatch: pytest.MonkeyPatch
):
    """As for the windows that do not fit."""
    monkeypatch.setattr(support, "backward_in_one_pass", lambda *_: False)
    compare_attention(problem, draw_attention(problem, dtype), dtype, device)
    assert passes == [2]


@pytest.mark.parametrize("wanted", [[1], [2], [0, 1], [2, 3], [1, 4], [0, 2, 3, 4]])
@pytest.mark.parametrize("problem", [same("some", 4, 11, 16), Problem("fraction", (4, 6), (6, 9), 16)], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted: list[int], problem: Problem, device: str, passes: list[int]):
    inputs = draw_attention(problem, torch.bfloat16)
    every = run_attention(ours, problem, inputs, torch.bfloat16, device)[1:]
    leaves = inputs.leaves(torch.bfloat16, device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    out = call_attention(ours, problem, leaves)
    got = torch.autograd.grad(out, [leaves[i] for i in wanted], inputs.grad.to(device, torch.bfloat16))
    assert all(torch.equal(g, every[i]) for g, i in zip(got, wanted, strict=True))
    assert passes == [1, 1]


@pytest.mark.parametrize("wanted", [[0], [3], [0, 4]])
def test_one_kernel_is_not_asked_for_less_than_it_makes(wanted: list[int], device: str, passes: list[int]):
    """Without dk and dv, the kernel of the queries has less to do."""
    problem = same("some", 4, 11, 16)
    inputs = draw_attention(problem, torch.bfloat16)
    leaves = inputs.leaves(torch.bfloat16, device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    exact, rival = (run_attention(eager, problem, inputs, dtype)[1:] for dtype in (torch.float64, torch.bfloat16))
    out = call_attention(ours, problem, leaves)
    got = torch.autograd.grad(out, [leaves[i] for i in wanted], inputs.grad.to(device, torch.bfloat16))
    for g, i in zip(got, wanted, strict=True):
        assert_close_as_eager(g, rival[i], exact[i], ATTENTION_NAMES[1 + i])


@HALVES
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme, dtype: torch.dtype, device: str, passes: list[int]):
    problem = same("extreme", 5, 11, 32, batch=2)
    inputs = draw_attention(problem, dtype)
    extreme(inputs)
    inputs.tensors = [t.to(dtype).double() for t in inputs.tensors]
    compare_attention(problem, inputs, dtype, device)
    assert passes == [1]


def test_packed_views_and_expanded_gradients(device: str, passes: list[int]):
    problem = same("strided", 4, 9, 16, batch=2, heads=3)
    inputs = draw_attention(problem, torch.bfloat16)
    leaves = inputs.leaves(torch.bfloat16, device)
    qkv = torch.stack([t.transpose(1, 2) for t in leaves[:3]], dim=2).permute(2, 0, 3, 1, 4)
    out = call_attention(ours, problem, [*qkv, *leaves[3:]])
    grad = inputs.grad[:1, :1, :, :1].to(device, torch.bfloat16).expand_as(out)
    got = torch.autograd.grad(out, leaves, grad)
    inputs.grad = grad.double().cpu().contiguous()
    expected = run_attention(ours, problem, inputs, torch.bfloat16, device)
    for name, g, e in zip(ATTENTION_NAMES, (out, *got), expected, strict=False):
        assert torch.equal(g, e), name
    assert passes == [1, 1]


def test_equal_bits_every_time(device: str):
    problem = same("repeated", 8, 12, 32, batch=2, heads=3)
    inputs = draw_attention(problem, torch.float16)
    first = run_attention(ours, problem, inputs, torch.float16, device)
    for _ in range(3):
        again = run_attention(ours, problem, inputs, torch.float16, device)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "dtype,k_size,head_dim,prefix,reason",
    [
        (torch.float32, (4, 9), 16, 0, "half precision"),
        (torch.float16, (4, 9), 96, 0, "a D up to 80, not 96"),
        (torch.float16, (4, 9), 16, 1, "no class tokens"),
        (torch.float16, (4, 8), 16, 0, "9 to 16 keys in a line, not 8"),
        (torch.float16, (4, 17), 16, 0, "9 to 16 keys in a line, not 17"),
        (torch.float16, (17, 9), 16, 0, "up to 16 lines of keys, not 17"),
    ],
)
def test_no_other_problem_goes_without_a_cache(dtype, k_size, head_dim, prefix, reason, device, monkeypatch):
    """The op refuses before any launch, should its caller think otherwise."""
    problem = Problem("other", k_size, k_size, head_dim, prefix=prefix)
    assert not fits(problem, device) or dtype == torch.float32
    monkeypatch.setattr(support, "backward_in_one_pass", lambda *_: True)
    with pytest.raises(RuntimeError, match=reason):
        run_attention(ours, problem, draw_attention(problem, dtype), dtype, device)


def test_too_many_queries_for_one_pass(device: str):
    assert not fits(Problem("many", (33, 1), (1, 9), 16), device)
    assert fits(Problem("as_many_as_go", (32, 1), (1, 9), 16), device)
