"""The shim that runs kernels on the CPU: it computes what CUDA would, and sees planted faults."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emulator
import problems
import relpos_cuda
from simt import toolchain

SELFTEST = toolchain.HERE / "selftest.cpp"
SCHEDULES = [("fifo", 0), ("lifo", 0), *(("random", seed) for seed in range(4))]

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))


class Shim:
    def __init__(self, library: Path, monkeypatch: pytest.MonkeyPatch):
        self.library = ctypes.CDLL(str(library))
        self.library.run.restype = ctypes.c_char_p
        self.library.simt_count.restype = ctypes.c_long
        self.monkeypatch = monkeypatch

    def schedule(self, name: str, seed: int = 0, copies: str = "late") -> None:
        self.monkeypatch.setenv("SIMT_SCHED", name)
        self.monkeypatch.setenv("SIMT_SEED", str(seed))
        self.monkeypatch.setenv("SIMT_ASYNC", copies)

    def complaint(self, kernel: str, x: Tensor, out: Tensor, n=0, fault="") -> str | None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
        message = self.library.run(kernel.encode(), *pointers, n, fault.encode())
        return message and message.decode()

    def __call__(self, kernel: str, x: Tensor, out: Tensor, n=0, fault="") -> Tensor:
        assert self.complaint(kernel, x, out, n, fault) is None
        return out

    def count(self, name: str) -> int:
        return self.library.simt_count(name.encode())


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toolchain.compile_library([SELFTEST], tmp_path_factory.mktemp("simt") / "selftest.so")


@pytest.fixture
def shim(library: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
    return Shim(library, monkeypatch)


def marked(name: str) -> str:
    """``file:line`` of the kernel line marked with ``line: name``."""
    numbered = enumerate(SELFTEST.read_text().splitlines(), 1)
    return f"selftest.cpp:{next(i for i, line in numbered if f'// line: {name}' in line)}"


def sum_of(shim: Shim, fault: str = "") -> bool:
    x = torch.arange(1000.0)
    return bool((shim("sum", x, torch.zeros(3), len(x), fault) == x.sum()).all())


def rotation(shim: Shim, fault: str = "") -> bool:
    x = torch.arange(96.0)
    return torch.equal(shim("rotate", x, torch.zeros(96), 5, fault), x.roll(-5))


def copy(shim: Shim, fault: str = "") -> bool:
    x = torch.arange(1.0, 1025)
    return torch.equal(shim("copy", x, torch.zeros(1024), 600, fault), x * (x <= 600))


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize(("name", "seed"), SCHEDULES)
def test_right_kernels_are_right_under_every_schedule(shim: Shim, name, seed, copies):
    shim.schedule(name, seed, copies)
    assert sum_of(shim) and rotation(shim) and copy(shim)


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (sum_of, "no barrier"),
        (rotation, "no barrier after the write"),
        (rotation, "no barrier after the read"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_missing_barrier_shows_under_some_schedule(shim: Shim, kernel, fault: str):
    def right(schedule: tuple[str, int]) -> bool:
        shim.schedule(*schedule)
        return kernel(shim, fault)

    assert not all(map(right, SCHEDULES))


def test_a_late_copy_shows_a_missing_wait_and_an_early_one_a_buffer_in_use(shim: Shim):
    def right(fault: str, copies: str) -> bool:
        shim.schedule("fifo", copies=copies)
        return copy(shim, fault)

    assert not right("waits for one group too few", "late")
    assert right("waits for one group too few", "early"), "early copies hide this one"
    assert not right("refills a buffer in use", "early")
    assert right("refills a buffer in use", "late"), "late copies hide this one"


def test_coordinates(shim: Shim):
    got = shim("coordinates", torch.empty(0), torch.zeros(12 * 24, 6, dtype=torch.int32))
    axes = [torch.arange(n, dtype=torch.int32) for n in (2, 3, 2, 2, 3, 4)]
    assert torch.equal(got, torch.cartesian_prod(*axes))


def test_warp_functions(shim: Shim):
    got = shim("warp", torch.empty(0), torch.zeros(64 * 8 + 1, dtype=torch.int32), 40)
    assert got[-1] == 64, "atomicAdd"
    for t, (*votes, ballot, fifth, down, quad, xor, shifted) in enumerate(got[:-1].view(64, 8).tolist()):
        lane, ours = t % 32, 32 if t < 32 else 8  # threads below 40 in this thread's warp
        assert (*votes, ballot % 2**32) == (1, int(ours == 32), 2**ours - 1)
        assert (fifth, down, quad) == (5, lane + 3 if lane < 29 else lane, lane // 4 * 4 + 1)
        assert xor == lane ^ 5
        assert shifted % 2**32 == (0x580000006 >> lane) % 2**32


def test_exp2(shim: Shim):
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([1.25, -1.75, 1e-3, 1.99, -inf, nan, -126, -126.5])
    exp2 = shim("exp2", x, torch.zeros(8))
    torch.testing.assert_close(exp2[:4], x[:4].exp2(), rtol=2**-22, atol=0)
    torch.testing.assert_close(exp2[4:], torch.tensor([0, nan, 2.0**-126, 0]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("matrices", [4, 2])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_gives_lane_l_row_l_over_4(shim: Shim, matrices: int, trans: bool):
    tile = torch.arange(4 * 8 * 8, dtype=torch.int16)
    n = -matrices if trans else matrices
    got = shim("ldmatrix", tile, torch.zeros(32, 4, 2, dtype=torch.int16), n)
    tiles = tile.view(4, 8, 8)[:matrices]
    if trans:
        tiles = tiles.mT
    # lane 4 i + j holds elements (i, 2 j) and (i, 2 j + 1) of every matrix
    want = tiles.reshape(matrices, 32, 2).transpose(0, 1)
    assert torch.equal(got[:, :matrices], want)
    assert shim.count("bank_conflicts") == 0


def test_a_deadlock_names_the_lines(shim: Shim):
    x = torch.zeros(64)
    message = shim.complaint("wait", x, x, fault="lane 0 skips a warp barrier")
    assert message.startswith("deadlock in block (0, 0, 0), 0 of 64 threads have exited")
    block, warp = (f"{toolchain.HERE}/{marked(f'{what} barrier')}" for what in ("block", "warp"))
    assert f"; 33 wait in __syncthreads at {block} (threads 0 to 63)" in message
    assert f"; 31 wait in __syncwarp at {warp} (threads 1 to 31)" in message


def test_threads_that_left_do_not_block_the_others(shim: Shim):
    x = torch.zeros(64)
    assert torch.equal(shim("wait", x, x, 40), (torch.arange(64) < 40).float())


@pytest.mark.parametrize(
    ("kernel", "n", "fault", "says"),
    [
        ("sum", 8, "write past the end", "wrote byte 16 of its 16 bytes of shared memory"),
        ("wait", 0, "one warp in another branch", marked("other branch")),
        ("wait", 0, "two masks for one barrier", "deadlock"),
        ("wait", 0, "not in its mask", "__syncwarp by lane 0, which mask fffffffe lacks"),
        ("wait", 0, "reads a lane outside the mask", "shuffle reads lane 16"),
        ("matmul float16", 0, "half a warp", f"{marked('mma')}: mma by lanes 0000ffff"),
        ("ldmatrix", 4, "misaligned", f"{marked('ldmatrix')}: ldmatrix: byte 2 "),
        ("ldmatrix", 4, "outside", "byte 512 is outside the 512 bytes"),
        ("copy", 600, "exits with a copy in flight", "before its asynchronous copies"),
        ("too many threads", 0, "", "launch refused"),
        ("grid too high", 0, "", "launch refused: grid (1, 65536, 1)"),
        ("empty grid", 0, "", "launch refused"),
        ("too much shared memory", 0, "", "launch refused"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_fault_is_reported_and_the_next_launch_works(shim: Shim, kernel, n, fault, says):
    complaint = shim.complaint(kernel, torch.zeros(1024), torch.zeros(1024), n, fault)
    assert says in (complaint or "no complaint")
    assert sum_of(shim)


def test_a_static_shared_array_does_not_compile(tmp_path: Path):
    source = tmp_path / "static.cpp"
    source.write_text('#include "simt.h"\n__global__ void kernel() { __shared__ float x[32]; }\n')
    with pytest.raises(RuntimeError, match="no static __shared__"):
        toolchain.compile_library([source], tmp_path / "static.so", ["-fsyntax-only"])


def test_the_largest_launch_is_accepted(shim: Shim):
    shim("largest launch", torch.empty(0), torch.empty(0))


def test_counters(shim: Shim):
    assert sum_of(shim)
    assert (shim.count("shuffles"), shim.count("block_barriers")) == (3 * 4 * 5, 3)


def test_bank_conflicts_are_counted(shim: Shim):
    """Rows of 32 bytes: the 8 of a matrix lie in 4 of the 8 columns of 16 bytes; b, with rows of 16, has none."""
    operands = torch.zeros(24 * 16, dtype=torch.float16)
    shim("matmul float16", operands, torch.zeros(16, 8), 1)
    assert shim.count("bank_conflicts") == 4 * 4


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 128])
def test_tiles_of_the_kernels_have_no_bank_conflicts(head_dim: int, monkeypatch: pytest.MonkeyPatch):
    emulator.use(monkeypatch)
    library = ctypes.CDLL(str(emulator.build()))
    library.simt_reset()
    problem = problems.same("conflicts", 4, 7, head_dim)
    problems.run(relpos_cuda.add_decomposed_rel_pos, problem, problems.draw(problem, torch.bfloat16), torch.bfloat16)
    assert library.simt_count(b"ldmatrix") > 0
    assert library.simt_count(b"bank_conflicts") == 0
