"""Layouts of the PTX manual in Python: what TMA and wgmma do to shared memory, who holds what of a product."""

from __future__ import annotations

import torch
from torch import Tensor

from .selftest_sm90 import Swizzle


def address_after(swizzle: Swizzle, address: Tensor) -> Tensor:
    """In rows of 128 bytes, the number of a chunk of 16 is exclusive-ored with the row's, as far as the span goes."""
    row, chunk, byte = address // 128, address // 16 % 8, address % 16
    return row * 128 + (chunk ^ (row % (swizzle.span // 16))) * 16 + byte


def tma_model(x: Tensor, box: tuple[int, ...], at: tuple[int, ...], swizzle: Swizzle) -> Tensor:
    """Bytes of the box, axis 0 the innermost, in shared memory."""
    part = x
    for axis, (first, length) in enumerate(zip(reversed(at), reversed(box), strict=True)):
        index = torch.arange(first, first + length)
        inside = (0 <= index) & (index < x.shape[axis])
        rows = part.index_select(axis, index.clamp(0, x.shape[axis] - 1))
        part = rows * inside.view(-1, *[1] * (x.dim() - axis - 1)).to(x.dtype)
    plain = part.contiguous().view(torch.uint8).flatten()
    out = torch.empty_like(plain)
    out[address_after(swizzle, torch.arange(len(plain)))] = plain
    return out


def layout(swizzle: Swizzle, mn_major: bool, mn: int, k: int) -> tuple[Tensor, dict[str, int]]:
    """Bytes of elements [mn, k] by the canonical layouts of the PTX manual, and what the descriptor says of them."""
    span, chunks = swizzle.span, swizzle.span // 16
    i, j = torch.arange(mn)[:, None], torch.arange(k)[None, :]
    if mn_major:
        stride = 8 * span  # rows of a span of mn, one for each k
        leading = stride * (k // 8)
        within = i % 8 * 2 + i // 8 % chunks * 16 + j % 8 * span
        if swizzle == Swizzle.NONE:
            stride, leading = 128, 16 * mn
            at, following = within + i // 8 * stride + j // 8 * leading, 2 * leading
        else:
            at, following = within + i // (8 * chunks) * leading + j // 8 * stride, 2 * stride
    elif swizzle == Swizzle.NONE:
        leading, stride = 128, 16 * k
        at, following = i % 8 * 16 + i // 8 * stride + j % 8 * 2 + j // 8 * leading, 2 * leading
    else:
        leading, stride = 16, 8 * span
        width = span // 2  # elements of k in a row; the others follow as a matrix of their own
        at = i % 8 * span + i // 8 * stride + j % width * 2 + j // width * (mn * span)
        following = 32 if width > 16 else mn * span
    return address_after(swizzle, at), {"leading": leading, "stride": stride, "next": following, "swizzle": swizzle}


def d_elements(n: int) -> tuple[Tensor, Tensor]:
    """Row and column of register r of thread t."""
    t, r = torch.arange(128)[:, None], torch.arange(n // 2)[None, :]
    return t // 32 * 16 + t % 32 // 4 + r // 2 % 2 * 8, r // 4 * 8 + t % 4 * 2 + r % 2


def a_registers(a: Tensor) -> Tensor:
    """[step, thread, 8]: as mma.m16n8k16 wants them, 16 rows for each warp."""
    t, r = torch.arange(128)[:, None], torch.arange(8)[None, :]
    row, column = t // 32 * 16 + t % 32 // 4 + r // 2 % 2 * 8, t % 4 * 2 + r % 2 + r // 4 * 8
    return torch.stack([a[:, step : step + 16][row, column] for step in range(0, a.shape[1], 16)])
