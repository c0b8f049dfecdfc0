"""The Hopper half of the shim: layouts as the PTX manual has them, a pipeline under every schedule, planted faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simt import toolchain
from simt.cases_sm90 import call, every_case, pipeline, relay, tma, wgmma
from simt.selftest_sm90 import Selftest, Swizzle, Tiling

SOURCE = toolchain.HERE / "selftest_sm90.cpp"
KERNELS = SOURCE.with_suffix(".cuh")
SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 0), ("random", 1), ("random", 2)]
EVERY_WAY = [(*s, asynchronous) for s in SCHEDULES for asynchronous in ("late", "early", "random")]

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))


def compiled(folder: Path, sanitizer: toolchain.Sanitizer = toolchain.PLAIN, *flags: str) -> Path:
    return toolchain.compile_library([SOURCE], folder / "selftest.so", ["-O1", "-g0", *flags], sanitizer=sanitizer)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def shim(library: Path) -> Selftest:
    return Selftest(library)


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch):
    def use(name: str, seed: int, asynchronous: str) -> None:
        monkeypatch.setenv("SIMT_SCHED", name)
        monkeypatch.setenv("SIMT_SEED", str(seed))
        monkeypatch.setenv("SIMT_ASYNC", asynchronous)

    return use


def marked(name: str) -> str:
    numbered = enumerate(KERNELS.read_text().splitlines(), 1)
    return f"{KERNELS.name}:{next(i for i, line in numbered if f'// line: {name}' in line)}"


# ---- right kernels


@pytest.mark.parametrize("name", every_case())
def test_the_emulator_computes_what_the_manual_says(shim: Selftest, name: str):
    answer = every_case()[name](shim)
    assert answer.complaint is None
    assert torch.equal(answer.got, answer.want)


@pytest.mark.parametrize(("dtype", "first"), [(torch.int16, -1), (torch.int16, 12), (torch.int32, 2)])
def test_tma_begins_at_whole_vectors(shim: Selftest, dtype: torch.dtype, first: int):
    """A GPU calls anything else an illegal instruction."""
    x = torch.zeros(8, 64, dtype=dtype)
    complaint = tma(shim, x, (16, 4), (first, 0), Swizzle.NONE).complaint
    assert f"tma_load: element {first} of axis 0 is not 16-byte aligned" in (complaint or "")


def test_tma_skips_what_lies_between_rows(shim: Selftest):
    x = torch.arange(6 * 40, dtype=torch.int16).view(6, 40)[::2, :16]
    assert tma(shim, x, (16, 4), (0, 1), Swizzle.B32).right


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_right_kernels_are_right_under_every_schedule(shim: Selftest, schedule, way):
    schedule(*way)
    assert pipeline(shim).right
    assert (shim.count("tma"), shim.count("wgmma")) == (2 * 5, 4 * 5)
    assert relay(shim).right
    assert shim.count("named_barriers") == 5 + 4


# ---- tensor maps


@pytest.mark.parametrize(
    ("offset", "box", "swizzle", "changes", "says"),
    [
        (1, (16, 4), Swizzle.NONE, {}, "the base must be aligned to 16 bytes, got 2"),
        (0, (12, 4), Swizzle.NONE, {}, "a row of the box must be a multiple of 16 bytes, got 24"),
        (0, (32, 4), Swizzle.B32, {}, "a row of this swizzle has 32 bytes, got 64"),
        (0, (16, 257), Swizzle.NONE, {}, "box of axis 1 must be 1 to 256, got 257"),
        (0, (16, 0), Swizzle.NONE, {}, "box of axis 1 must be 1 to 256, got 0"),
        (0, (16, 4), Swizzle.NONE, {"stride": 72}, "stride of axis 1 must be a multiple of 16 bytes, got 72"),
        (0, (16, 4), Swizzle.NONE, {"stride": 1 << 40}, "stride of axis 1 must be below 2^40, got 1099511627776"),
        (0, (16, 4), Swizzle.NONE, {"size": 0}, "size of axis 1 must be 1 to 2^32, got 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_the_driver_would_refuse(shim: Selftest, offset: int, box, swizzle, changes, says: str):
    x = torch.zeros(1000, dtype=torch.int16)[offset:][: 8 * 64].view(8, 64)
    assert tma(shim, x, box, (0, 0), swizzle, **changes).complaint == f"relpos_cuda: TensorMap: {says}"


def test_elements_and_axes_that_tma_does_not_have(shim: Selftest):
    x = torch.zeros(64, dtype=torch.int64)
    assert "elements must have 2 or 4 bytes, got 8" in (tma(shim, x, (8,), (0,), Swizzle.NONE).complaint or "")
    complaint = call(shim, "tma 5", x, x, n=4096, tiling=Tiling(element_bytes=2, rank=6))
    assert "1 to 5 axes are possible, got 6" in (complaint or "")


@pytest.mark.parametrize(
    ("fault", "swizzle", "says"),
    [
        ("aligned to 16", Swizzle.NONE, "byte 1024 of shared memory is not 128-byte aligned"),
        ("off the swizzle", Swizzle.B128, "byte 1152 of shared memory is not 1024-byte aligned"),
        ("off the swizzle", Swizzle.B64, "byte 1152 of shared memory is not 512-byte aligned"),
        ("off the swizzle", Swizzle.B32, "byte 1152 of shared memory is not 256-byte aligned"),
        ("outside", Swizzle.NONE, "are outside the"),
    ],
)
def test_a_box_in_the_wrong_place(shim: Selftest, fault: str, swizzle: Swizzle, says: str):
    x = torch.zeros(64, 64, dtype=torch.int16)
    complaint = tma(shim, x, (swizzle.span // 2, 8), (0, 0), swizzle, fault).complaint
    assert f"{marked('tma')}: tma_load: " in (complaint or "") and says in (complaint or "")


# ---- faults


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (pipeline, "no wait for a copy"),
        (pipeline, "wrong parity"),
        (pipeline, "overwrites a stage"),
        (pipeline, "releases early"),
        (pipeline, "wrong stride"),
        (pipeline, "no wgmma_wait"),
        (relay, "reads early"),
        (relay, "overwrites"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_fault_shows_in_the_result_under_some_schedule(shim: Selftest, schedule, kernel, fault: str):
    def right(way: tuple[str, int, str]) -> bool:
        schedule(*way)
        return kernel(shim, fault).right

    assert not all(map(right, EVERY_WAY))


@pytest.mark.parametrize(
    ("kernel", "fault", "says"),
    [
        (pipeline, "half a tile's bytes", "tma_load brings 4096 bytes more than its mbarrier expects"),
        (pipeline, "one tile's bytes", "the block ends with 5 copies of TMA in flight"),
        (
            pipeline,
            "too many bytes",
            f"/{marked('full')} (threads 0 to 127)",
        ),
        (pipeline, "a copy too many", "the block ends with 2 copies of TMA in flight"),
        (
            pipeline,
            "arrives twice",
            f"{marked('twice')}: arrives where all 1 have arrived (thread 128 of block 0, 0, 0)",
        ),
        (pipeline, "barriers not shown to TMA", "tma_load on an mbarrier that mbarrier_fence_init has not shown"),
        (pipeline, "no wgmma_fence", "comes to wgmma without wgmma_fence"),
        (pipeline, "touches accumulators", "wrote to the accumulators of this wgmma before wgmma_wait"),
        (pipeline, "no wgmma_commit", "exits before its wgmma has been waited for"),
        (pipeline, "no wgmma_wait", "exits before its wgmma has been waited for"),
        (pipeline, "half a warpgroup", "64 wait in setmaxnreg"),
        (pipeline, "initialised twice", "this mbarrier has been initialised before"),
        (pipeline, "no parity", f"{marked('full')}: mbarrier_wait for parity 2"),
        (relay, "no whole warps", "named barrier 1: 100 threads are not some of the block's warps"),
        (relay, "id 0", "named barrier 0: there are 1 to 15"),
        (relay, "another count", "named barrier 1: of"),
        (
            relay,
            "does not arrive",
            f"/{marked('relay')} (threads 64 to 127)",
        ),
        (relay, "part of a warp", "named_barrier by lanes 0000ffff; it needs the whole warp"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_fault_is_named_and_the_next_launch_works(shim: Selftest, kernel, fault: str, says: str):
    assert says in (kernel(shim, fault).complaint or "no complaint")
    assert kernel(shim).right


@pytest.mark.parametrize("swizzle", [Swizzle.B128, Swizzle.B64, Swizzle.B32])
def test_matrices_in_the_wrong_place(shim: Selftest, swizzle: Swizzle):
    for kind in ("ss", "rs"):
        for fault, says in (("off the swizzle", "is not where its swizzle repeats"), ("outside", "an operand: bytes")):
            assert says in (wgmma(shim, kind, "float16", 64, False, swizzle, swizzle, fault).complaint or "")


def test_accumulators_keep_their_shape(shim: Selftest):
    complaint = wgmma(shim, "rs", "float16", 80, False, Swizzle.B128, Swizzle.B128, "another shape").complaint
    assert f"{marked('shape')}: uses accumulators of another shape before wgmma_wait" in (complaint or "")


def test_operands_in_registers_stay_until_they_are_waited_for(shim: Selftest, schedule):
    schedule("fifo", 0, "late")
    complaint = wgmma(shim, "rs", "float16", 64, False, Swizzle.B128, Swizzle.B128, "touches operands").complaint
    assert "an operand in registers was changed before wgmma_wait" in (complaint or "")


def test_every_group_of_products_needs_a_fence(shim: Selftest):
    complaint = wgmma(shim, "ss", "float16", 64, False, Swizzle.B128, Swizzle.B128, "no fence after a commit").complaint
    assert "comes to wgmma without wgmma_fence since its last wgmma_commit" in (complaint or "")


def test_a_warp_is_no_warpgroup(shim: Selftest):
    complaint = pipeline(shim, kernel="pipeline without a producer warpgroup").complaint
    assert f"{marked('dec')}: setmaxnreg: not in a whole warpgroup" in (complaint or "")


def test_surplus_bytes_are_found_when_the_block_ends(shim: Selftest, schedule):
    schedule("fifo", 0, "early")
    assert "the block ends with -8192 bytes expected by the mbarrier at byte 0" in (
        pipeline(shim, "one tile's bytes", tiles=2).complaint or ""
    )


def test_barriers_used_at_once_are_not_initialised(shim: Selftest, schedule):
    schedule("lifo", 0, "late")
    assert f"{marked('empty')}: this mbarrier is not initialised" in (
        pipeline(shim, "barriers used at once").complaint or ""
    )
