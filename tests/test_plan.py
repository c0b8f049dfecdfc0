"""The planner: what a GPU would be given, without one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import relpos_cuda
from problems import MODELS
from relpos_cuda import _loader, tables

PER_BLOCK = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory


@pytest.fixture(scope="module")
def plan():
    planner = _loader.plan()
    assert planner is not None
    return planner.plan_logits


@pytest.mark.parametrize("arch", PER_BLOCK)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "q_size,k_size,head_dim",
    [
        ((64, 64), (64, 64), 64),
        ((64, 64), (64, 64), 80),
        ((14, 14), (14, 14), 80),
        ((56, 56), (14, 14), 96),
        ((8, 56, 56), (8, 7, 7), 96),
        ((128, 128), (128, 128), 128),
        ((50, 76), (50, 76), 64),
        ((5, 13), (5, 13), 14),
    ],
)
def test_models_fit_every_architecture(plan, arch, direction, dtype, q_size, k_size, head_dim):
    p = plan(direction, dtype, 16, q_size, k_size, head_dim, 1, arch)
    assert p.refusal == ""
    assert p.shared_bytes <= PER_BLOCK[arch] * 1024
    rows = 16 * (1 + torch.Size(q_size).numel())
    assert p.grid == -(-rows // p.block_rows)
    cores = dtype != "float32" and head_dim % 8 == 0
    assert p.kernel.endswith("_mma" if cores else "_simt")
    assert not cores or p.block_rows % 16 == 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_blocks_of_sam_share_an_sm(plan, direction, dtype):
    p = plan(direction, dtype, 16, (64, 64), (64, 64), 80, 0, 90)
    assert 2 * p.shared_bytes <= 226 * 1024
    assert p.block_rows == (16 if direction == "forward" else 64)


@pytest.mark.parametrize("keys,rows", [((14, 14), 64), ((32, 32), 64), ((33, 32), 32), ((64, 64), 16), ((99, 99), 16)])
def test_a_block_of_the_forward_has_few_long_rows(plan, keys, rows):
    """It begins to stream before long, and ends before long; short ones are worth as few beginnings as can be."""
    assert plan("forward", "bfloat16", 16, (64, 64), keys, 64, 0, 90).block_rows == rows


def test_long_axes_take_fewer_rows_and_then_are_refused(plan):
    rows = [plan("forward", "float32", 1, (1, k), (1, k), 64, 0, 80).block_rows for k in (64, 1024, 4096, 16384)]
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]
    assert "shared memory" in plan("forward", "float32", 1, (1, 60000), (1, 60000), 64, 0, 80).refusal


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("sideways", "float32", 1, (2, 2), (2, 2), 8, 0, 80), "direction"),
        (("forward", "int8", 1, (2, 2), (2, 2), 8, 0, 80), "dtype"),
        (("forward", "float32", 1, (2, 2, 2), (2, 2), 8, 0, 80), "q_size and k_size"),
        (("forward", "float32", 1, (4, 4), (4, 0), 8, 0, 80), r"k_size\[1\] must be at least 1 .*, got 0"),
        (("forward", "float32", 1, (1 << 20, 1 << 20), (4, 4), 8, 0, 80), r"q_size has 2\^31 tokens or more"),
        (("forward", "float32", 1, (4, 4), (4, 4), 0, 0, 80), "the head dimension is out of range: 0"),
        (("forward", "float32", 1, (4, 4), (4, 4), 8, -1, 80), "num_prefix_tokens is out of range: -1"),
    ],
)
def test_errors(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def on_gpu(dtype: torch.dtype, grid: tuple[int, ...], head_dim: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, 1, math.prod(grid), head_dim, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "dtype,q_size,k_size,reason",
    [
        (torch.bfloat16, (64, 64), (64, 64), None),
        (torch.float32, (5, 13), (5, 13), None),
        (torch.float64, (5, 13), (5, 13), "float64 has no CUDA kernel"),
        (torch.float32, (99, 4), (117, 4), "two keys share a table row"),
        (torch.float32, (1, 60000), (1, 60000), "exceed shared memory"),
    ],
)
def test_is_supported(dtype, q_size, k_size, reason):
    got = relpos_cuda.is_supported(on_gpu(dtype, q_size, 64), q_size, k_size)
    assert got is None if reason is None else reason in got


ATTENTION_KERNELS = ("forward", "backward_queries", "backward_keys")


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("problem", [p for p in MODELS if p.head_dim % 8 == 0], ids=str)
def test_attention_of_models_fits_every_architecture(kernel, problem):
    for arch, dtype in itertools.product(PER_BLOCK, ("float16", "bfloat16", "float32")):
        check_attention(arch, kernel, dtype, problem)


def check_attention(arch, kernel, dtype, problem):
    sizes = (problem.batch * problem.heads, problem.q_size, problem.k_size, problem.head_dim, problem.prefix)
    p = _loader.plan().plan_attention(kernel, dtype, *sizes, arch, problem.head_dim**-0.5)
    assert p.refusal == ""
    assert 0 < p.shared_bytes <= PER_BLOCK[arch] * 1024
    assert p.threads in (32, 64, 128, 256) and p.block_rows % (p.threads // 2) == 0
    line = -(-problem.k_size[-1] // 8) * 8
    slots = -(-problem.prefix // 8) * 8 + math.prod(problem.k_size[:-1]) * line
    rows = slots if kernel == "backward_keys" else problem.rows
    assert p.grid == sizes[0] * -(-rows // p.block_rows)
    assert p.kernel.startswith("attention_" + {"forward": "fwd"}.get(kernel, kernel.replace("backward", "bwd")))


@pytest.mark.parametrize("k_size", [(64, 64), (48, 48), (14, 14), (50, 76), (128, 128)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128])
@pytest.mark.parametrize("kernel", ["forward_sm90", "backward_queries_sm90", "backward_keys_sm90"])
def test_the_kernels_for_sm90_fit(kernel, head_dim, k_size):
    p = _loader.plan().plan_attention(kernel, "bfloat16", 12, (64, 65), k_size, head_dim, 0, 90, 0.1)
    if kernel == "backward_queries_sm90" and k_size == (128, 128) and head_dim > 64:
        assert "exceed shared memory" in p.refusal  # line factors and their gradients of 128 queries
        return
    slots = k_size[0] * (-(-k_size[1] // 8) * 8)
    blocks = -(-slots // 128) if kernel == "backward_keys_sm90" else 33
    assert (p.refusal, p.threads, p.block_rows, p.grid) == ("", 3 * 128, 2 * 64, 12 * blocks)
    assert 0 < p.shared_bytes <= PER_BLOCK[90] * 1024
    name = kernel.replace("forward", "fwd").replace("backward", "bwd")
    assert p.kernel.startswith(f"attention_{name}_d{head_dim}")
    assert ("_line" in p.kernel) == (kernel != "backward_keys_sm90")


@pytest.mark.parametrize(
    "kernel,dtype,k_size,prefix,arch,reason",
    [
        ("forward", "float32", (64, 64), 0, 90, "half precision"),
        ("forward", "bfloat16", (64, 64), 1, 90, "class tokens"),
        ("backward_queries", "bfloat16", (64, 64), 1, 90, "class tokens"),
        ("backward_keys", "bfloat16", (64, 129), 0, 90, "up to 128"),
        ("forward", "bfloat16", (64, 64), 0, 80, "sm_90"),
        ("backward_keys", "bfloat16", (64, 64), 0, 100, "sm_90"),
        ("forward", "bfloat16", (1000, 1), 0, 90, "exceed shared memory"),
        ("backward_queries", "bfloat16", (400, 1), 0, 90, "exceed shared memory"),
    ],
)
def test_the_kernels_for_sm90_refuse(kernel, dtype, k_size, prefix, arch, reason):
    p = _loader.plan().plan_attention(f"{kernel}_sm90", dtype, 1, k_size, k_size, 64, prefix, arch, 0.1)
    assert reason in p.refusal and p.kernel == "none"


@pytest.mark.parametrize(
    "q_size,k_size,prefix,head_dim,threads,rows",
    [
        ((14, 14), (14, 14), 0, 64, 7 * 32, 2 * 7 * 16),  # 13 strips in two passes
        ((14, 14), (14, 14), 0, 80, 7 * 32, 2 * 7 * 16),
        ((7, 7), (7, 7), 1, 96, 4 * 32, 4 * 16),
        ((16, 16), (16, 16), 0, 64, 8 * 32, 2 * 8 * 16),
        ((56, 56), (14, 14), 1, 96, 15 * 32, 2 * 15 * 16),  # 197 strips in seven blocks, one to an SM
    ],
)
def test_the_forward_of_windows(q_size, k_size, prefix, head_dim, threads, rows):
    p = _loader.plan().plan_attention("forward_window", "bfloat16", 3, q_size, k_size, head_dim, prefix, 90, 0.1)
    assert (p.refusal, p.threads, p.block_rows) == ("", threads, rows)
    assert p.grid == 3 * -(-(math.prod(q_size) + prefix) // rows)
    assert p.shared_bytes <= PER_BLOCK[90] * 1024
    assert p.kernel == f"attention_fwd_window_d{head_dim}_line_{16 if k_size[1] > 8 else 8}"


@pytest.mark.parametrize(
    "dtype,k_size,head_dim,arch,reason",
    [
        ("float32", (14, 14), 64, 90, "half precision"),
        ("float16", (14, 14), 104, 90, "up to 96"),
        ("float16", (3, 17), 64, 90, "up to 16 keys in a line"),
        ("float16", (23, 14), 64, 90, "up to 320 keys"),
        ("float16", (20, 16), 96, 120, "exceed shared memory"),
    ],
)
def test_the_forward_of_windows_refuses(dtype, k_size, head_dim, arch, reason):
    p = _loader.plan().plan_attention("forward_window", dtype, 1, k_size, k_size, head_dim, 0, arch, 0.1)
    assert reason in p.refusal and p.kernel == "none"


@pytest.mark.parametrize("head_dim,archs", [(64, {80, 90, 100}), (80, {90, 100})])
def test_windows_have_one_kernel_where_they_fit(head_dim, archs):
    window = (14, 14)
    for arch, kib in PER_BLOCK.items():
        p = _loader.plan().plan_attention("backward_window", "bfloat16", 300, window, window, head_dim, 0, arch, 0.1)
        assert (p.threads, p.block_rows, p.grid) == (7 * 32, 7 * 16, 300)  # 14 lines, two per warp
        assert (p.refusal == "") == (p.shared_bytes <= kib * 1024) == (arch in archs)
        assert p.kernel == (f"attention_bwd_window_d{head_dim}" if arch in archs else "none")


@pytest.mark.parametrize(
    "k_size,tile",
    [
        ((64, 64), "line_64"),
        ((9, 48), "line_48"),
        ((9, 76), "line_48"),  # two spans of 40
        ((9, 128), "line_64"),
        ((14, 14), "lines_64"),
        ((9, 20), "lines_64"),
    ],
)
def test_tiles_follow_the_lines_of_the_grid(k_size, tile):
    p = _loader.plan().plan_attention("forward", "bfloat16", 1, k_size, k_size, 72, 0, 80, 0.1)
    assert p.kernel == f"attention_fwd_d80_{tile}"


@pytest.mark.parametrize(
    "dtype,head_dim,k_size,scale,reason",
    [
        (torch.bfloat16, 80, (64, 64), None, None),
        (torch.float32, 8, (5, 13), 1.0, None),
        (torch.bfloat16, 12, (5, 13), None, "multiples of 8 up to 128"),
        (torch.bfloat16, 136, (5, 13), None, "multiples of 8 up to 128"),
        (torch.float64, 64, (5, 13), None, "float64 has no CUDA kernel"),
        (torch.bfloat16, 64, (5, 13), 0.0, "scale"),
        (torch.bfloat16, 64, (5, 13), -0.125, "scale"),
        (torch.bfloat16, 64, (5, 13), 1000.0, "scale"),
        (torch.bfloat16, 64, (60000, 1), None, "exceed shared memory"),
    ],
)
def test_attention_is_supported(dtype, head_dim, k_size, scale, reason):
    got = relpos_cuda.is_supported(on_gpu(dtype, k_size, head_dim), k_size, k_size, op="attention", scale=scale)
    assert got is None if reason is None else reason in got


def test_attention_refuses_what_it_cannot_divide_by():
    with pytest.raises(ValueError, match=r"k_size\[1\] must be at least 1"):
        _loader.plan().plan_attention("forward", "float32", 1, (4, 4), (4, 0), 8, 0, 80, 1.0)


def test_attention_refuses_an_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be"):
        _loader.plan().plan_attention("sideways", "float32", 1, (2, 2), (2, 2), 8, 0, 80, 1.0)


def test_origins_say_what_the_index_says():
    """csrc/shapes.h; for pairs of axes, so that each is once the second."""
    planner = _loader.plan()
    lengths = (1, 2, 3, 4, 5, 7, 8, 12, 14, 28, 31, 56, 64, 127, 128)
    looked_up = set()
    for q, k in itertools.product(lengths, lengths):
        q_size, k_size = (q, 9), (k, 4)
        for sizes in ((q_size, k_size), (q_size[::-1], k_size[::-1])):
            lookup = tables.host_lookup(*sizes)
            assert lookup.one_to_one
            start = 0
            for q_axis, k_axis, (k_shift, origin, origin_step) in zip(*sizes, planner.origins(*sizes), strict=True):
                index = lookup.values[start : start + q_axis * k_axis].view(q_axis, k_axis).long()
                origins = origin + origin_step * torch.arange(q_axis)[:, None]
                keys = torch.arange(k_axis)
                if k_shift >= 0:
                    assert torch.equal(index, origins - (keys << k_shift)), (q_axis, k_axis)
                else:
                    looked_up.add((q_axis, k_axis))
                    assert torch.equal(lookup.values[origins + index].long(), keys.expand(q_axis, k_axis))
                start += q_axis * k_axis
    assert {(9, 4), (14, 3), (12, 4), (3, 2)} <= looked_up
    assert not {(64, 64), (56, 14), (14, 28), (128, 1), (1, 127)} & looked_up


def test_cpu_tensors_are_always_supported():
    assert relpos_cuda.is_supported(torch.zeros(1, 1, 4, 8, dtype=torch.float64), (2, 2), (2, 2)) is None
    assert "meta" in relpos_cuda.is_supported(torch.zeros(1, 1, 4, 8, device="meta"), (2, 2), (2, 2))
