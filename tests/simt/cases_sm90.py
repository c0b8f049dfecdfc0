"""Problems for the kernels of selftest_sm90.cuh, on the emulator or a GPU, with right answers: integers, so exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .layouts import a_registers, d_elements, layout, tma_model
from .selftest_sm90 import Given, Operand, Selftest, Swizzle, Tiling

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WIDTHS = (32, 48, 64, 80, 96, 112, 128)
BOXES = [  # a tensor, a box of it: axis 0 last and first
    ((200,), (96,)),
    ((9, 64), (32, 7)),
    ((3, 5, 32), (16, 4, 2)),
    ((2, 3, 4, 24), (8, 3, 2, 2)),
    ((2, 2, 3, 2, 16), (8, 2, 2, 2, 2)),
]


class Answer(NamedTuple):
    complaint: str | None
    got: Tensor
    want: Tensor

    @property
    def right(self) -> bool:
        return self.complaint is None and torch.equal(self.got, self.want)


def integers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """So small that every sum is exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def call(test: Selftest, kernel: str, out: Tensor, a=None, b=None, fault="", **more) -> str | None:
    given = Given(**more)
    for name, t in (("a", a), ("b", b), ("out", out)):
        if t is not None:
            setattr(given, name, t.data_ptr())
            setattr(given, f"{name}_bytes", t.untyped_storage().nbytes() - t.storage_offset() * t.element_size())
    return test.complaint(kernel, given, fault)


def stmatrix(test: Selftest, trans: bool) -> Answer:
    tiles = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    held = tiles.reshape(4, 32, 2).transpose(0, 1).contiguous()  # by lane 4 i + j: (i, 2 j), (i, 2 j + 1)
    out = torch.zeros(4, 8, 8, dtype=torch.int16)
    return Answer(call(test, "stmatrix trans" if trans else "stmatrix", out, held), out, tiles.mT if trans else tiles)


def tma(test: Selftest, x: Tensor, box, at, swizzle: Swizzle, fault: str = "", **changes: int) -> Answer:
    """`changes`: of the last axis of the tiling."""
    rank, size = x.dim(), x.element_size()
    n = 1024 + size * int(torch.tensor(box).prod())
    out = torch.full((n,), 0xAA, dtype=torch.uint8)
    t = Tiling(x.data_ptr(), size, rank, swizzle=swizzle)
    t.size[:rank], t.stride[:rank], t.box[:rank] = x.shape[::-1], [s * size for s in reversed(x.stride())], box
    for name, value in changes.items():
        getattr(t, name)[rank - 1] = value
    complaint = call(test, f"tma {rank}", out, x, fault=fault, n=n, tiling=t, at=(*at, *[0] * (5 - rank)))
    return Answer(complaint, out[1024:], tma_model(x, box, at, swizzle))


def corners(begins: str, swizzle: Swizzle, shape, box, dtype: torch.dtype) -> Iterator[tuple[Tensor, tuple, tuple]]:
    """Tensor, box and its first element: at and across the ends of every axis, or also before and behind them.

    Along axis 0, in steps of 16 bytes: between them, TMA ends in an illegal instruction.

    Args:
        begins: ``inside`` the tensor, as boxes of the kernels do, or ``outside``.
    """
    x = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).view(shape)
    if swizzle != Swizzle.NONE:
        box = (swizzle.span // x.element_size(), *box[1:])
    steps = (16 // x.element_size(), 1, 1, 1, 1)
    ends = [
        (-step, 0, max(0, size - length) // step * step, (size - 1) // step * step)
        for size, length, step in zip(reversed(shape), box, steps, strict=False)
    ]
    every = [at for at in itertools.product(*ends) if (min(at) >= 0) == (begins == "inside")]
    if begins == "outside":
        every.append(tuple(-length for length in box))
    yield from ((x, box, at) for at in every[:: len(every) // 40 | 1])


def every_corner(test: Selftest, *tiling) -> Answer:
    answers = [tma(test, x, box, at, tiling[1]) for x, box, at in corners(*tiling)]
    complaint = next((a.complaint for a in answers if a.complaint), None)
    return Answer(complaint, torch.stack([a.got for a in answers]), torch.stack([a.want for a in answers]))


def wgmma(
    test: Selftest, kind: str, dtype: str, n: int, mn_major: bool, a_swizzle: Swizzle, b_swizzle, fault=""
) -> Answer:
    """`kind`: ss or rs, which has no use for `a_swizzle`. K-major operands have more than one span of each swizzle."""
    k = 80
    a, b = (integers(rows, k, dtype=DTYPES[dtype]) for rows in (64, n))
    memory, operands, end = torch.zeros(24 << 10, dtype=torch.int16), [], 0
    for matrix, swizzle, major in ((a, a_swizzle, False), (b, b_swizzle, mn_major)):
        at, fields = layout(swizzle, major, len(matrix), k)
        assert len(at.unique()) == at.numel()
        operands.append(Operand(at=end, **fields))
        memory[(end + at) // 2] = matrix.view(torch.int16)
        end += (int(at.max()) // 1024 + 1) * 1024
    d, name = torch.full((128, n // 2), torch.nan), f"{kind} {dtype} {n} {'mn' if mn_major else 'k'}"
    more = {"n": k // 16, "at": (end, 0, 0, 0, 0), "a_operand": operands[0], "b_operand": operands[1]}
    complaint = call(test, name, d, memory, a_registers(a).contiguous(), fault, **more)
    got = torch.full((64, n), torch.nan)
    got[d_elements(n)] = d
    return Answer(complaint, got, (a.double() @ b.double().T).float())


def pipeline(test: Selftest, fault: str = "", tiles: int = 5, kernel: str = "pipeline") -> Answer:
    a, b = integers(64, 64 * tiles), integers(64 * tiles, 64)
    out = torch.full((64, 64), torch.nan)
    return Answer(call(test, kernel, out, a, b, fault, n=tiles), out, (a.double() @ b.double()).float())


def relay(test: Selftest, fault: str = "", rounds: int = 5) -> Answer:
    out = torch.zeros(64, dtype=torch.int32)
    return Answer(call(test, "relay", out, fault=fault, n=rounds), out, rounds * torch.arange(64, dtype=torch.int32))


def every_case() -> dict[str, Callable[[Selftest], Answer]]:
    """By a name: the kernel's, and what varies. Last what no kernel of the ops asks for."""
    cases: dict[str, Callable[[Selftest], Answer]] = {"relay": relay, "pipeline": pipeline}
    cases |= {f"stmatrix{' trans' if trans else ''}": partial(stmatrix, trans=trans) for trans in (False, True)}
    for kind, dtype, n, mn_major, b in itertools.product(("ss", "rs"), DTYPES, WIDTHS, (False, True), Swizzle):
        a = Swizzle(len(Swizzle) - 1 - b)
        name = f"{kind} {dtype} {n} {'mn' if mn_major else 'k'}, {b.name}" + (f", a {a.name}" if kind == "ss" else "")
        cases[name] = lambda test, p=(kind, dtype, n, mn_major, a, b): wgmma(test, *p)
    for begins, (shape, box), swizzle, dtype in itertools.product(
        ("inside", "outside"), BOXES, Swizzle, (torch.int16, torch.int32)
    ):
        tiling = (begins, swizzle, shape, box, dtype)
        name = f"tma {len(shape)}, {swizzle.name}, {dtype.itemsize} bytes, begins {begins}"
        cases[name] = lambda test, t=tiling: every_corner(test, *t)
    return cases
