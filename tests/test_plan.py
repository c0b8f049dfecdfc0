"""The planner: what a GPU would be given, without one."""

from __future__ import annotations

import pytest
import torch

import relpos_cuda
from relpos_cuda import _loader

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
    assert p.block_rows == 64


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
    ],
)
def test_errors(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


class OnGpu:
    """Looks like a CUDA tensor to is_supported, which reads device, dtype and head dimension only."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype, head_dim: int):
        self.dtype, self.shape = dtype, (1, 1, 1, head_dim)


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
    got = relpos_cuda.is_supported(OnGpu(dtype, 64), q_size, k_size)
    assert got is None if reason is None else reason in got


def test_cpu_tensors_are_always_supported():
    assert relpos_cuda.is_supported(torch.zeros(1, 1, 4, 8, dtype=torch.float64), (2, 2), (2, 2)) is None
    assert "meta" in relpos_cuda.is_supported(torch.zeros(1, 1, 4, 8, device="meta"), (2, 2), (2, 2))
