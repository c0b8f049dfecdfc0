"""``python -m relpos_cuda info | build | check | demo``."""

from __future__ import annotations

import argparse
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m relpos_cuda", description=relpos_cuda.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, found, built and planned")
    build = commands.add_parser("build", help="compile the native libraries now")
    build.add_argument("kind", nargs="?", choices=[*_libraries.KINDS, "all"], default="all")
    commands.add_parser("check", help="compare the kernels with the formula on every device")
    commands.add_parser("demo", help="see them at work; takes arguments of its own", add_help=False)
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from . import demo

        return demo.main(others) or 0
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if arguments.command == "build":
        return build_now(_libraries.KINDS if arguments.kind == "all" else [arguments.kind])
    return info() if arguments.command == "info" else check()


# ---- build


def build_now(kinds: Iterable[str]) -> int:
    os.environ[_env.VERBOSE.name] = "1"
    failed = 0
    for kind in kinds:
        try:
            print(f"{kind:6} {_build.build(kind)}")
        except _build.BuildError as error:
            print(f"{kind:6} not built: {error}")
            failed = 1
    return failed


# ---- info


def info() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it, below
        for kind in _libraries.KINDS:
            with contextlib.suppress(_build.BuildError):
                _loader.load(kind)
    _print_section("versions", versions())
    _print_section("compilers", compilers())
    libraries = [(kind, str(status)) for kind, status in _loader.status().items()]
    _print_section("libraries", [*libraries, ("cache", str(_env.CACHE_DIR()))])
    set_now = [(v.name, os.environ[v.name]) for v in _env.ALL if v.is_set()]
    _print_section("environment", set_now or [("nothing set", "-")])
    print("plan of the logits kernels")
    planner = _loader.status()["plan"].module
    print(sam_plans(planner) if planner else "  no planner")
    return 0


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


def sam_plans(planner: ModuleType) -> str:
    """The plan of every SAM layer, as a table."""
    heading = ("arch", "model", "layer", "pass", "dtype", "kernel", "rows", "threads", "shared", "grid")
    table = [heading]
    layers = itertools.product((80, 90), SAM_MODELS, SAM_LAYERS, ("forward", "backward"), ("bfloat16", "float32"))
    for arch, (model, heads, head_dim), (layer, windows, grid), direction, dtype in layers:
        p = planner.plan_logits(direction, dtype, windows * heads, grid, grid, head_dim, 0, arch)
        what = (str(arch), model, layer, direction, dtype, p.refusal or p.kernel)
        table.append((*what, *map(str, (p.block_rows, p.threads, p.shared_bytes, p.grid))))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numeric = len(heading) - 4
    lines = []
    for row in table:
        cells = (c.rjust(w) if i >= numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


# ---- check


def check() -> int:
    """Forward and backward against the formula, by the rule of the tests; 1 if a device fails or has no kernels."""
    failed = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        native = _loader.load(device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wrong = wrong_results(device, dtype)
            path = "native kernels" if native else "PyTorch path"
            print(f"{device:5} {str(dtype).removeprefix('torch.'):9} {path:15} {'; '.join(wrong) or 'ok'}")
            failed |= bool(wrong) or not native
    return int(failed)


def wrong_results(device: str, dtype: torch.dtype) -> list[str]:
    """What is off by more than twice the error of the formula in the same dtype, plus one rounding."""
    torch.manual_seed(0)
    size, tokens, head_dim = (14, 14), 196, 64
    shapes = [(2, tokens, tokens), (2, tokens, head_dim), (27, head_dim), (27, head_dim)]
    inputs = [torch.randn(shape, device=device, dtype=dtype) * head_dim**-0.5 for shape in shapes]
    grad = torch.randn(shapes[0], device=device, dtype=dtype)

    def run(function: Callable[..., torch.Tensor], to: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(to, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves, size, size)
        return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(to)))]

    formula = relpos_cuda.reference.add_decomposed_rel_pos
    runs = (run(relpos_cuda.add_decomposed_rel_pos, dtype), run(formula, dtype), run(formula, torch.float64))
    names = ("out", "d attn", "d q", "d rel_pos_h", "d rel_pos_w")
    wrong = []
    for name, got, eager, exact in zip(names, *runs, strict=True):
        error = (got - exact).abs().max().item()
        allowed = 2 * (eager - exact).abs().max().item() + torch.finfo(dtype).eps * exact.abs().max().item()
        if not error <= allowed:
            wrong.append(f"{name} is off by {error:.1e}, allowed {allowed:.1e}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
