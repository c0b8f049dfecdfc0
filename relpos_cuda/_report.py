"""What ``python -m relpos_cuda info`` prints: what is installed, found, built and planned."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import torch

import relpos_cuda

from . import _build, _env, _libraries, _loader, _toolchain

Row = tuple[str, str]

# name, heads, head dimension
SAM_MODELS = [("SAM-B", 12, 64), ("SAM-L", 16, 64), ("SAM-H", 16, 80)]
SAM_LAYERS = [("global", 1, (64, 64)), ("window", 25, (14, 14))]  # name, windows of an image, grid
KERNELS = {  # where windows, or sm_90, have kernels of their own, these run
    "logits": ("forward", "backward"),
    "attention": (
        *("forward_window", "forward_sm90", "forward", "backward_window"),
        *("backward_queries_sm90", "backward_queries", "backward_keys_sm90", "backward_keys"),
    ),
}


def info() -> int:
    useless = [] if torch.cuda.is_available() else ["cuda"]  # and takes minutes to compile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it, below
        for kind in _libraries.KINDS:
            if kind not in useless:
                with contextlib.suppress(_build.BuildError, _env.BadValueError):
                    _loader.load(kind)
    _print_section("versions", versions())
    _print_section("compilers", compilers())
    libraries = [
        (kind, "not loaded: no GPU is visible" if kind in useless else str(status))
        for kind, status in _loader.status().items()
    ]
    _print_section("libraries", [*libraries, ("cache", str(_env.CACHE_DIR()))])
    set_now = [(v.name, said_of(v)) for v in _env.ALL if v.is_set()]
    _print_section("environment", set_now or [("nothing set", "-")])
    planner = _loader.status()["plan"].module
    plans = [f"plan of the {op} kernels\n{sam_plans(planner, op) if planner else '  no planner'}" for op in KERNELS]
    print("\n\n".join(plans))
    return 0


def said_of(variable: _env.Variable) -> str:
    """What it is set to, and what is wrong with that."""
    try:
        variable()
    except _env.BadValueError as error:
        return str(error).removeprefix(f"{variable.name}=")
    return os.environ[variable.name]


def _print_section(title: str, rows: Iterable[Row]) -> None:
    print(title)
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        for i, line in enumerate(value.splitlines()):
            print(f"  {'' if i else name:{width}}  {line}")
    print()


def versions() -> list[Row]:
    rows = [
        ("relpos_cuda", f"{relpos_cuda.__version__}  {Path(relpos_cuda.__file__).parent}"),
        ("python", sys.version.split()[0]),
        ("torch", f"{torch.__version__}  CUDA {torch.version.cuda or '-'}"),
        ("cpu", torch.backends.cpu.get_cpu_capability()),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("gpu", "none visible")]
    driver = _toolchain.output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    rows.append(("driver", driver.split("\n")[0] or "unknown"))
    for device in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(device)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        rows.append((f"gpu {device}", f"{found.name}, compute capability {found.major}.{found.minor}, {size}"))
    return rows


def compilers() -> list[Row]:
    def cxx() -> str:
        return f"{_toolchain.version_of(_toolchain.cxx())}  {' '.join(_toolchain.cxx())}"

    def nvcc() -> str:
        return f"{_toolchain.nvcc()}  {_toolchain.nvcc().path}"

    def ninja() -> str:
        return f"{_toolchain.version_of((_toolchain.ninja(),))}  {_toolchain.ninja()}"

    def archs() -> str:
        return " ".join(_toolchain.archs())

    return [(f.__name__, _or_reason(f)) for f in (cxx, nvcc, ninja, archs)]


def _or_reason(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except _build.BuildError as error:
        return str(error)


def sam_plans(planner: ModuleType, op: str) -> str:
    """The plan of every SAM layer, as a table."""
    heading = ("arch", "model", "layer", "pass", "dtype", "kernel", "rows", "threads", "shared", "grid")
    table = [heading]
    layers = itertools.product((80, 90), SAM_MODELS, SAM_LAYERS, KERNELS[op], ("bfloat16", "float32"))
    for arch, (model, heads, head_dim), (layer, windows, grid), kernel, dtype in layers:
        problem = (kernel, dtype, windows * heads, grid, grid, head_dim, 0, arch)
        p = planner.plan_logits(*problem) if op == "logits" else planner.plan_attention(*problem, head_dim**-0.5)
        if kernel.endswith(("_window", "_sm90")) and p.refusal:
            continue  # the others take it
        what = (str(arch), model, layer, kernel, dtype, p.refusal or p.kernel)
        table.append((*what, *map(str, (p.block_rows, p.threads, p.shared_bytes, p.grid))))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numeric = len(heading) - 4
    lines = []
    for row in table:
        cells = (c.rjust(w) if i >= numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)
