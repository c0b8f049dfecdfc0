"""Machine code of the library, without a GPU.

    librelpos_cuda.so ──cuobjdump──▶ kernels of an architecture (machine_code.py)
    ptxas.log ──────────────────────▶ registers, spills, warnings

`python tests/sass.py` prints what a kernel costs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).parent.parent))

from checks import EVERYTHING
from machine_code import Kernel, parse
from relpos_cuda import _build, _libraries, _toolchain
from relpos_cuda._build import BuildError

ARCHS = ("80", "90a")
OTHER_ARCHS = ("86", "89", "100", "120")
HEAD_DIMS = {"float32": (64,), "bfloat16": (64, 80, 96)}  # of the attention; float16 differs in two opcodes
if EVERYTHING:
    HEAD_DIMS = dict.fromkeys(("float32", "bfloat16", "float16"), (64, 80, 96, 112, 128))
VARIANTS = {"float": "float32", "half": "float16", "nv_bfloat16": "bfloat16"}  # of compile units
SHARED_PER_SM = {"80": 164, "86": 100, "89": 100, "90a": 228, "100": 228, "120": 100}  # KiB, CUDA programming guide
REGISTERS_PER_SM, REGISTERS_AT_ONCE = 65536, 256  # the latter: what a warp's share is rounded up to
RESERVED_SHARED = 1024  # of every block


# ---- what ptxas says


@dataclass(frozen=True)
class Usage:
    arch: str
    mangled: str
    registers: int
    memory: str  # "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"

    @property
    def local_bytes(self) -> int:
        return sum(map(int, re.findall(r"\d+", self.memory)))


def usage_of(log: str) -> list[Usage]:
    entry = r"Compiling entry function '(\w+)' for 'sm_(\w+)'(?:(?!Compiling)[\s\S])*?"
    memory = r"(\d+ bytes stack frame.*)(?:(?!Compiling)[\s\S])*?Used (\d+) registers"
    return [Usage(arch, name, int(count), text) for name, arch, text, count in re.findall(entry + memory, log)]


def complaints(log: str) -> list[str]:
    """Lines of ptxas that are more than numbers: warnings, and notes such as (C7510)."""
    return [line for line in log.splitlines() if re.search(r"\(C\d{4}\)|warning|Performance Loss", line)]


def blocks_per_sm(arch: str, threads: int, registers: int, shared_bytes: int = 0) -> int:
    of_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = REGISTERS_PER_SM // (of_warp * threads // 32)
    return min(by_registers, SHARED_PER_SM[arch] * 1024 // (shared_bytes + RESERVED_SHARED))


# ---- library and tools


def no_nvcc() -> str:
    """Why the kernels cannot be compiled for every architecture, or nothing."""
    try:
        nvcc = _toolchain.nvcc()
    except BuildError as error:
        return str(error)
    return "" if nvcc.version >= (12, 8) else f"{nvcc} does not know all of these architectures"


def tool(name: str) -> Path | None:
    """On the PATH, beside nvcc, or in a package of the Python environment."""
    if found := shutil.which(name):
        return Path(found)
    places = [] if no_nvcc() else [_toolchain.nvcc().path.parent]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        places += sorted(Path(root).glob("*/bin"))
    return next((place / name for place in places if (place / name).is_file()), None)


def missing() -> str:
    """Why machine code cannot be read here, or nothing."""
    lacking = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return no_nvcc() or (f"no {' and no '.join(lacking)}" if lacking else "")


def library(archs: tuple[str, ...] = ARCHS, head_dims: dict[str, tuple[int, ...]] = HEAD_DIMS) -> Path:
    """The CUDA library, from the cache if it is there; what `head_dims` lack saves minutes."""

    def dtypes_of(unit: _libraries.Unit) -> list[str]:
        return [VARIANTS[unit.variant]] if unit.variant else [*head_dims]

    def with_fewer_kernels(unit: _libraries.Unit) -> _libraries.Unit:
        flags = [f"-DRELPOS_MOST_HEAD_DIM={max(head_dims[dtype][-1] for dtype in dtypes_of(unit))}"]
        flags += [] if "float16" in head_dims else ["-DRELPOS_WITHOUT_FLOAT16"]
        return dataclasses.replace(unit, flags=(*unit.flags, *flags))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(archs))
        library = _libraries.library("cuda")
        units = tuple(with_fewer_kernels(unit) for unit in library.units if set(dtypes_of(unit)) <= set(head_dims))
        return _build.build_library(dataclasses.replace(library, units=units))


def forward_source(arch: str) -> str:
    """Some kernels of the forward, for D 80 and 64."""
    kernels = ["fwd_window_kernel<__nv_bfloat16, 80, 2, true>(const AttentionFwdParams)"]
    ways = {"fwd": "const AttentionFwdParams", "fwd_sm90": "const __grid_constant__ AttentionFwdSm90Params"}
    for name, params in ways.items() if arch == "90a" else [*ways.items()][:1]:
        kernels += [f"{name}_kernel<__nv_bfloat16, {tile}>({params})" for tile in ("80, 8, true", "64, 8, false")]
    files = dict.fromkeys(kernel.partition("_kernel")[0] for kernel in kernels)
    includes = [f'#include "cuda/attention_{file}.cuh"' for file in files]
    instances = [f"template __global__ void attention_{kernel};" for kernel in kernels]
    return "\n".join([*includes, "namespace relpos {", *instances, "}", ""])


def forward_loops(arch: str, folder: Path, *flags: str) -> dict[str, float]:
    """Instructions per logit of a thread in the loops over keys of some kernels of the forward.

    TORCH_CUDA_ARCH_LIST must name the architecture.
    """
    folder.mkdir()
    source, object_file = folder / "forward.cu", folder / "forward.o"
    source.write_text(forward_source(arch))
    library = _libraries.library("cuda")
    unit = next(u for u in library.units if u.source.name == "attention_fwd.cu")
    of_unit = [flag for flag in unit.flags if not flag.startswith("-DRELPOS_TYPE")]
    include = [f for i in (*library.include, *library.system_include) for f in ("-isystem", str(i))]
    command = [str(_toolchain.nvcc().path), *of_unit, *flags, *include, "-c", str(source), "-o", str(object_file)]
    subprocess.run(command, check=True, capture_output=True)
    found = {}
    for kernel in kernels_of(object_file, arch):
        head_dim, blocks = map(int, str(kernel).split()[2:4])
        of_sm90, of_window = "sm90" in str(kernel), "window" in str(kernel)
        strips, blocks = 1 if of_sm90 or of_window or head_dim > 80 else 2, 4 if of_window else blocks
        loop = kernel.product_loop((head_dim // 16 + blocks // 2) if of_sm90 else strips * blocks * head_dim // 8)
        assert loop is not None, f"{kernel}: no loop over keys"
        found[str(kernel)] = len(kernel.within(loop)) / (strips * blocks * 4)
    return found


def kernels_of(path: Path, arch: str) -> list[Kernel]:
    search = os.pathsep.join((str(Path(tool("nvdisasm") or "").parent), os.environ.get("PATH", "")))
    command = [str(tool("cuobjdump")), "-sass", "-arch", f"sm_{arch}", str(path)]
    done = subprocess.run(command, env={**os.environ, "PATH": search}, check=True, capture_output=True, text=True)
    return parse(done.stdout)


# ---- the report


def rows(kernels: Iterable[Kernel], registers: dict[str, int]) -> list[tuple[str, ...]]:
    head = ("kernel", "registers", "instructions", "loop", "logits", "per logit", "way", "per logit")
    table: list[tuple[str, ...]] = [head]
    for kernel in sorted(kernels, key=str):
        cells = [str(kernel), str(registers[kernel.mangled]), str(len(kernel.code))]
        if loop := kernel.stream_loop:
            inside, way = kernel.within(loop), kernel.shortest_iteration(loop)
            logits = sum(i.streams_in for i in inside) * kernel.vector
            cells += [str(len(inside)), str(logits), f"{len(inside) / logits:.1f}"]
            cells += [str(way), f"{way / logits:.1f}"] if way else ["", ""]
        table.append((*cells, *[""] * (len(head) - len(cells))))
    return table


def report() -> str:
    path = library()
    usage = usage_of((path.parent / "ptxas.log").read_text())
    lines = [
        "loop: instructions of the loop that streams the logits, rare cases too; logits: of a thread, per iteration;"
    ]
    lines += ["way: the shortest iteration that reads and writes every vector, inner loops run once"]
    for arch in ARCHS:
        table = rows(kernels_of(path, arch), {u.mangled: u.registers for u in usage if u.arch == arch})
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", f"sm_{arch}"]
        for first, *others in table:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join((first.ljust(widths[0]), *cells)).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(missing() or report())
