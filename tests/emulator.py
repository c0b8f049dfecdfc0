"""The CUDA ops on the CPU: csrc/cuda compiled with tests/simt instead of CUDA's runtime, registered for CPU tensors.

The library takes the place of the native ops while a test runs, so that every parametrised test doubles as a test of
the CUDA launchers and kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from relpos_cuda import _libraries, _ops, autograd, support
from simt import toolchain

ROOT = Path(__file__).parent.parent
DTYPES = [f"-DRELPOS_TYPE={dtype}" for dtype in _libraries.CUDA_DTYPES]
UNITS = [(f"csrc/{name}", dtype) for name in _libraries.CUDA_KERNELS for dtype in DTYPES]
UNITS += [
    (f"csrc/{name}", f"-DRELPOS_TYPE={t}") for name in _libraries.CUDA_SM90_KERNELS for t in _libraries.CUDA_HALVES
]
UNITS += [(f"csrc/{name}", "") for name in (*_libraries.CUDA_SOURCES, *_libraries.CUDA_HOST_SOURCES)]
NAMESPACE = "relpos_emulated"
WITHOUT_FLOAT16 = "-DRELPOS_WITHOUT_FLOAT16"
FEW_KERNELS = ("-DRELPOS_MOST_HEAD_DIM=64", WITHOUT_FLOAT16)  # for what is compiled with sanitizers
ARCH = "RELPOS_EMULATED_ARCH"  # variable with the architecture that plans are for
INSTEAD = "RELPOS_EMULATED_LIBRARY"  # variable that names another library to test, one with a planted bug


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the ops of CPU tensors through the emulated library for the rest of the test."""
    if INSTEAD not in os.environ and (missing := toolchain.missing()):
        pytest.skip(f"no emulator: {missing}")
    ops = load()
    for name in _ops.SCHEMAS:
        monkeypatch.setattr(_ops, name, getattr(ops, name).default)
    monkeypatch.setattr(autograd, "_needs_work_spaces", lambda q: True)
    monkeypatch.setattr(support, "fused", _fused)
    monkeypatch.setattr(support, "_arch", lambda device: int(os.environ.get(ARCH, "80")))
    support.refusal.cache_clear()  # it goes by devices, and what was one architecture may be another now


def _fused(
    q: torch.Tensor,
    q_size: tuple[int, ...],
    k_size: tuple[int, ...],
    prefix: int,
    op: str = "logits",
    scale: float | None = None,
) -> bool:
    """As for a GPU; but the logits op is to refuse by itself."""
    if op == "logits":
        return True
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    return not support._constant(torch.device("cuda"), q.dtype, q_size, k_size, head_dim, prefix, op, scale)


@functools.cache
def load() -> torch._ops._OpNamespace:
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in _ops.SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=library)
    torch.ops.load_library(str(build()))
    load.library = library  # type: ignore[attr-defined]  # keeps the schemas alive
    return getattr(torch.ops, NAMESPACE)


def build() -> Path:
    """Compiles the library once per content of the sources; it takes a minute or two on two cores."""
    if instead := os.environ.get(INSTEAD):
        return Path(instead)
    folder = toolchain.BUILT / _digest()
    library = folder / f"lib{NAMESPACE}.so"
    with toolchain.locked(folder) as is_there:  # two processes that run tests want it at the same time
        return library if is_there else compile_tree(ROOT, library)


def count(name: str, call: Callable[[], object]) -> int:
    """How much a counter of tests/simt/simt.cpp grows during the call."""
    library = ctypes.CDLL(str(build()))
    library.simt_count.restype = ctypes.c_long
    before = library.simt_count(name.encode())
    call()
    return int(library.simt_count(name.encode()) - before)


def compile_tree(root: Path, library: Path, sanitizer: toolchain.Sanitizer = toolchain.PLAIN, *more: str) -> Path:
    """The library of a tree that has csrc and tests/simt: the project, or a copy of it."""
    left_out = "-DRELPOS_TYPE=__half" if WITHOUT_FLOAT16 in more else None
    units = [(root / source, flag) for source, flag in UNITS if flag != left_out]
    return toolchain.compile_library(units, library, [*_flags(), *more], root, sanitizer)


def _flags() -> list[str]:
    include = str(Path(torch.__file__).parent / "include")
    ops = (f"-DRELPOS_OPS={NAMESPACE}", "-DRELPOS_DEVICE=CPU")
    return [*ops, *_libraries.STABLE_ABI, "-isystem", include, *_libraries.torch_inputs()]


def _digest() -> str:
    digest = hashlib.sha256(repr(_flags()).encode())
    for folder in (ROOT / "csrc", ROOT / "tests" / "simt"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
