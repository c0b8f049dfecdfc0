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


def matrix_bytes(swizzle: Swizzle, mn_major: bool, mn: Tensor, k: Tensor, leading: int, stride: int) -> Tensor:
    """Of elements [mn, k] of one k16 step, k < 16, before they are swizzled: the canonical layouts."""
    span = swizzle.span
    if mn_major:  # rows of a span, along mn
        per_row, per_8 = (stride, leading) if swizzle == Swizzle.NONE else (leading, stride)
        return mn // (span // 2) * per_row + mn % (span // 2) * 2 + k // 8 * per_8 + k % 8 * span
    per_8 = leading if swizzle == Swizzle.NONE else 16
    return mn // 8 * stride + mn % 8 * span + k // 8 * per_8 + k % 8 * 2


def layout(swizzle: Swizzle, mn_major: bool, mn: int, k: int) -> tuple[Tensor, dict[str, int]]:
    """Bytes of elements [mn, k] of a dense matrix, and what a descriptor says of them."""
    span, steps, next_span = swizzle.span, k // 16, 0
    if swizzle == Swizzle.NONE:
        leading, stride = (16 * mn, 128) if mn_major else (128, 16 * k)
        following = 2 * leading
    elif mn_major:
        leading, stride = span * k, 8 * span
        following = 2 * stride
    else:  # spans of all rows, one after another
        leading, stride, following = 16, 8 * span, 32
        steps, next_span = span // 32, mn * span
    i, j, step = torch.arange(mn)[:, None], torch.arange(k)[None, :] % 16, torch.arange(k)[None, :] // 16
    at = matrix_bytes(swizzle, mn_major, i, j, leading, stride) + step // steps * next_span + step % steps * following
    fields = {"leading": leading, "stride": stride, "next": following, "steps": steps, "span": next_span}
    return address_after(swizzle, at), fields | {"swizzle": swizzle}


def d_elements(n: int) -> tuple[Tensor, Tensor]:
    """Row and column of register r of thread t."""
    t, r = torch.arange(128)[:, None], torch.arange(n // 2)[None, :]
    return t // 32 * 16 + t % 32 // 4 + r // 2 % 2 * 8, r // 4 * 8 + t % 4 * 2 + r % 2


def a_registers(a: Tensor) -> Tensor:
    """[step, thread, 8]: as mma.m16n8k16 wants them, 16 rows for each warp."""
    t, r = torch.arange(128)[:, None], torch.arange(8)[None, :]
    row, column = t // 32 * 16 + t % 32 // 4 + r // 2 % 2 * 8, t % 4 * 2 + r % 2 + r // 4 * 8
    return torch.stack([a[:, step : step + 16][row, column] for step in range(0, a.shape[1], 16)])
