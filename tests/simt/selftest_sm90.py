"""Calls the kernels of selftest_sm90.cpp: from a test, or as a process of its own with nothing but Python's library.

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
    _fields_ = [(name, ctypes.c_int) for name in ("at", "leading", "stride", "next", "swizzle")]


class Params(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("at", ctypes.c_int * 5),
        ("tiling", Tiling),
        ("a_operand", Operand),
        ("b_operand", Operand),
        ("planted", ctypes.c_char_p),
        ("maps", Tiling * 2),  # made there
    ]


class Selftest:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.run.restype = ctypes.c_char_p
        self.library.simt_count.restype = ctypes.c_long

    def complaint(self, kernel: str, params: Params, fault: str = "") -> str | None:
        params.planted = fault.encode()
        message = self.library.run(kernel.encode(), ctypes.byref(params))
        return message and message.decode()

    def count(self, name: str) -> int:
        return self.library.simt_count(name.encode())


def on_zeros(library: Path, fault: str, kernel: str) -> str | None:
    a, b, out = (ctypes.create_string_buffer(1 << 16) for _ in range(3))
    aligned = [(ctypes.addressof(buffer) + 127) // 128 * 128 for buffer in (a, b, out)]
    params = Params(*aligned, n=2 if kernel.startswith(("ss", "rs")) else 4)
    params.at[0] = 2 * 64 * 128  # bytes of two K-major matrices
    params.a_operand = Operand(0, 16, 1024, 32, Swizzle.B128)
    params.b_operand = Operand(64 * 128, 16, 1024, 32, Swizzle.B128)
    return Selftest(library).complaint(kernel, params, fault)


if __name__ == "__main__":
    for kernel in sys.argv[3:]:
        print(on_zeros(Path(sys.argv[1]), sys.argv[2], kernel) or "")
