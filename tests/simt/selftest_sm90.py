"""Calls the kernels of selftest_sm90.cuh: from a test, or as a process of its own with nothing but Python's library.

selftest_sm90.py LIBRARY FAULT KERNEL ...     on zeros; prints the shim's complaints, if any
"""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from pathlib import Path


class Swizzle(IntEnum):  # as in csrc/cuda/swizzle.h
    NONE, B128, B64, B32 = range(4)

    @property
    def span(self) -> int:
        return {Swizzle.NONE: 16, Swizzle.B128: 128, Swizzle.B64: 64, Swizzle.B32: 32}[self]


class Tiling(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("element_bytes", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("box", ctypes.c_int * 5),
        ("swizzle", ctypes.c_int),
    ]


class Operand(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("at", "leading", "stride", "next", "steps", "span", "swizzle")]


class Given(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("a_bytes", ctypes.c_int64),
        ("b_bytes", ctypes.c_int64),
        ("out_bytes", ctypes.c_int64),
        ("n", ctypes.c_int),
        ("at", ctypes.c_int * 5),
        ("tiling", Tiling),
        ("a_operand", Operand),
        ("b_operand", Operand),
        ("planted", ctypes.c_char_p),
    ]


class Selftest:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.run_sm90.restype = ctypes.c_char_p

    def complaint(self, kernel: str, given: Given, fault: str = "") -> str | None:
        given.planted = fault.encode()
        message = self.library.run_sm90(kernel.encode(), ctypes.byref(given))
        return message and message.decode()

    def count(self, name: str) -> int:
        self.library.simt_count.restype = ctypes.c_long
        return self.library.simt_count(name.encode())


def on_zeros(library: Path, fault: str, kernel: str) -> str | None:
    a, b, out = (ctypes.create_string_buffer(1 << 16) for _ in range(3))
    aligned = [(ctypes.addressof(buffer) + 127) // 128 * 128 for buffer in (a, b, out)]
    given = Given(*aligned, *[1 << 15] * 3, n=2 if kernel.startswith(("ss", "rs")) else 4)
    given.at[0] = 2 * 64 * 128  # bytes of two K-major matrices
    given.a_operand = Operand(0, 16, 1024, 32, 4, 0, Swizzle.B128)
    given.b_operand = Operand(64 * 128, 16, 1024, 32, 4, 0, Swizzle.B128)
    return Selftest(library).complaint(kernel, given, fault)


if __name__ == "__main__":
    for kernel in sys.argv[3:]:
        print(on_zeros(Path(sys.argv[1]), sys.argv[2], kernel) or "")
