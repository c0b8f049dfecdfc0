"""The Hopper half of the shim: layouts as the PTX manual has them, a pipeline under every schedule, planted faults."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simt import toolchain
from simt.layouts import a_registers, d_elements, layout, tma_model
from simt.selftest_sm90 import Operand, Params, Selftest, Swizzle, Tiling

SOURCE = toolchain.HERE / "selftest_sm90.cpp"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 0), ("random", 1), ("random", 2)]
POISON = 0xFF  # of shared memory

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
    numbered = enumerate(SOURCE.read_text().splitlines(), 1)
    return f"{SOURCE.name}:{next(i for i, line in numbered if f'// line: {name}' in line)}"


def integers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """So small that every sum is exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# ---- stmatrix


@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix_takes_row_l_over_4_from_lane_l(shim: Selftest, trans: bool):
    tiles = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    held = tiles.reshape(4, 32, 2).transpose(0, 1).contiguous()  # by lane 4 i + j: (i, 2 j), (i, 2 j + 1)
    out = torch.zeros(4, 8, 8, dtype=torch.int16)
    params = Params(a=held.data_ptr(), out=out.data_ptr(), n=-1 if trans else 1)
    assert shim.complaint("stmatrix", params) is None
    assert torch.equal(out, tiles.mT if trans else tiles)
    assert shim.count("stmatrix") == 1


# ---- TMA


def run_tma(shim: Selftest, x: Tensor, box, at, swizzle, fault="", **changes) -> tuple[str | None, Tensor]:
    rank, size = x.dim(), x.element_size()
    strides = [s * size for s in reversed(x.stride())]
    n = 1024 + size * int(torch.tensor(box).prod())
    out = torch.full((n,), POISON, dtype=torch.uint8)
    params = Params(out=out.data_ptr(), n=n)
    params.at[:rank] = at
    t = params.tiling = Tiling(base=x.data_ptr(), element_bytes=size, rank=rank, swizzle=swizzle)
    t.size[:rank], t.stride[:rank], t.box[:rank] = x.shape[::-1], strides, box
    for name, value in changes.items():
        getattr(t, name)[rank - 1] = value
    params.tiling = t
    return shim.complaint(f"tma {rank}", params, fault), out[1024:]


TMA_PROBLEMS = [  # tensor, box: axis 0 last and first
    ((200,), (96,)),
    ((9, 64), (32, 7)),
    ((3, 5, 32), (16, 4, 2)),
    ((2, 3, 4, 24), (8, 3, 2, 2)),
    ((2, 2, 3, 2, 16), (8, 2, 2, 2, 2)),
]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("swizzle", Swizzle)
@pytest.mark.parametrize(("shape", "box"), TMA_PROBLEMS, ids=lambda v: str(len(v)))
def test_tma_copies_boxes_of_every_rank(shim: Selftest, shape, box, swizzle: Swizzle, dtype: torch.dtype):
    x = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).view(shape)
    if swizzle != Swizzle.NONE:
        box = (swizzle.span // x.element_size(), *box[1:])
    corners = [(-1, 0, max(0, size - length), size - 1) for size, length in zip(reversed(shape), box, strict=True)]
    origins = list(itertools.product(*corners))
    outside = tuple(-length for length in box)
    for at in (*origins[:: len(origins) // 40 | 1], outside):
        complaint, got = run_tma(shim, x, box, at, swizzle)
        assert complaint is None
        assert torch.equal(got, tma_model(x, box, at, swizzle)), at


def test_tma_skips_what_lies_between_rows(shim: Selftest):
    x = torch.arange(6 * 40, dtype=torch.int16).view(6, 40)[::2, :16]
    complaint, got = run_tma(shim, x, (16, 4), (0, 1), Swizzle.B32)
    assert complaint is None and torch.equal(got, tma_model(x.contiguous(), (16, 4), (0, 1), Swizzle.B32))


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
    complaint, _ = run_tma(shim, x, box, (0, 0), swizzle, **changes)
    assert complaint == f"relpos_cuda: TensorMap: {says}"


def test_elements_and_axes_that_tma_does_not_have(shim: Selftest):
    for t, says in (
        (torch.zeros(64, dtype=torch.int64), "elements must have 2 or 4 bytes, got 8"),
        (torch.zeros([2] * 5 + [16], dtype=torch.int16), None),
    ):
        if says:
            assert says in (run_tma(shim, t, (8,), (0,), Swizzle.NONE)[0] or "")
        else:
            params = Params(n=4096, tiling=Tiling(base=t.data_ptr(), element_bytes=2, rank=6))
            assert "1 to 5 axes are possible, got 6" in (shim.complaint("tma 5", params) or "")


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
    complaint, _ = run_tma(shim, x, (swizzle.span // 2, 8), (0, 0), swizzle, fault)
    assert f"{marked('tma')}: tma_load: " in (complaint or "") and says in (complaint or "")


# ---- wgmma


def run_wgmma(shim: Selftest, kind: str, dtype: str, n: int, mn_major: bool, a_swizzle, b_swizzle):
    a, b, k = integers(64, 32, dtype=DTYPES[dtype]), integers(n, 32, dtype=DTYPES[dtype]), 32
    memory, operands, end = torch.zeros(1 << 16, dtype=torch.int16), [], 0
    for matrix, swizzle, major in ((a, a_swizzle, False), (b, b_swizzle, mn_major)):
        at, fields = layout(swizzle, major, len(matrix), k)
        assert len(at.unique()) == at.numel()
        operands.append(Operand(at=end, **fields))
        memory[(end + at) // 2] = matrix.view(torch.int16)
        end += (int(at.max()) // 1024 + 1) * 1024
    registers, d = a_registers(a).contiguous(), torch.full((128, n // 2), torch.nan)
    params = Params(a=memory.data_ptr(), b=registers.data_ptr(), out=d.data_ptr(), n=k // 16)
    params.at[0], params.a_operand, params.b_operand = end, *operands
    complaint = shim.complaint(f"{kind} {dtype} {n} {'mn' if mn_major else 'k'}", params)
    got = torch.full((64, n), torch.nan)
    got[d_elements(n)] = d
    return complaint, got, (a.double() @ b.double().T).float()


@pytest.mark.parametrize("mn_major", [False, True], ids=["k", "mn"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 80, 96, 112, 128])
def test_wgmma_is_a_matrix_product(shim: Selftest, n: int, dtype: str, mn_major: bool):
    for kind, a_swizzle, b_swizzle in [("rs", Swizzle.NONE, s) for s in Swizzle] + [
        ("ss", a, b) for a, b in zip(Swizzle, reversed(Swizzle), strict=True)
    ]:
        complaint, got, want = run_wgmma(shim, kind, dtype, n, mn_major, a_swizzle, b_swizzle)
        assert complaint is None
        assert torch.equal(got, want), (kind, a_swizzle, b_swizzle)
        assert shim.count("wgmma") == 2


# ---- whole kernels, right and with a fault


def pipeline(shim: Selftest, fault: str = "", tiles: int = 5) -> tuple[str | None, bool]:
    """The complaint; whether the result is right."""
    a, b = integers(64, 64 * tiles), integers(64 * tiles, 64)
    out = torch.full((64, 64), torch.nan)
    params = Params(a.data_ptr(), b.data_ptr(), out.data_ptr(), n=tiles)
    return shim.complaint("pipeline", params, fault), torch.equal(out, (a.double() @ b.double()).float())


def relay(shim: Selftest, fault: str = "", rounds: int = 5) -> tuple[str | None, bool]:
    out = torch.zeros(64, dtype=torch.int32)
    complaint = shim.complaint("relay", Params(out=out.data_ptr(), n=rounds), fault)
    return complaint, torch.equal(out, rounds * torch.arange(64, dtype=torch.int32))


EVERY_WAY = [(*s, asynchronous) for s in SCHEDULES for asynchronous in ("late", "early", "random")]


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_right_kernels_are_right_under_every_schedule(shim: Selftest, schedule, way):
    schedule(*way)
    assert pipeline(shim) == (None, True)
    assert (shim.count("tma"), shim.count("wgmma")) == (2 * 5, 4 * 5)
    assert relay(shim) == (None, True)
    assert shim.count("named_barriers") == 5 + 4


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
        return kernel(shim, fault) == (None, True)

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
        (pipeline, "arrives twice", f"{marked('twice')}: thread 128 arrives where all 1 have arrived"),
        (pipeline, "barriers not shown to TMA", "tma_load on an mbarrier that mbarrier_fence_init has not shown"),
        (pipeline, "no wgmma_fence", "comes to wgmma without wgmma_fence"),
        (pipeline, "touches accumulators", "wrote to the accumulators of this wgmma before wgmma_wait"),
        (pipeline, "no wgmma_wait", "exits before its wgmma has been waited for"),
        (pipeline, "half a warpgroup", "64 wait in setmaxnreg"),
        (pipeline, "setmaxnreg by one warp", "setmaxnreg: thread 128 is in no whole warpgroup"),
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
    assert says in (kernel(shim, fault)[0] or "no complaint")
    assert kernel(shim) == (None, True)


def test_surplus_bytes_are_found_when_the_block_ends(shim: Selftest, schedule):
    schedule("fifo", 0, "early")
    assert "the block ends with -8192 bytes expected by the mbarrier at byte 0" in (
        pipeline(shim, "one tile's bytes", tiles=2)[0] or ""
    )


def test_barriers_used_at_once_are_not_initialised(shim: Selftest, schedule):
    schedule("lifo", 0, "late")
    assert f"{marked('empty')}: this mbarrier is not initialised" in (pipeline(shim, "barriers used at once")[0] or "")
