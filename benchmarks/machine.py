"""What a result was measured on: names, versions, and the rates of copies and products, as they are that minute."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import relpos_cuda

from .cases import DTYPES

COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes
PRODUCT = {"cpu": 1024, "cuda": 8192}  # side of the matrices
SAMPLES = 5


def about(device: str) -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"relpos_cuda": relpos_cuda.__version__}
    described = {"date": str(datetime.date.today()), "commit": commit(), "versions": versions, "kind": device}
    if device == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["triton"] = importlib.metadata.version("triton")
        return described | {"device": torch.cuda.get_device_name(), "driver": of_gpu("driver_version")}
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return described | {"device": models[0] if models else platform.machine(), "isa": isa, "threads": threads}


def commit() -> str:
    """With a mark, if what is measured differs from it; gpu_run.sh says it where the history is not at hand."""
    if named := os.environ.get("COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = said_by(*git, "status", "--porcelain", "-uno", "--", "../csrc", "../relpos_cuda", ".")
    return (said_by(*git, "rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def of_gpu(what: str) -> str:
    return said_by("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader").split("\n")[0] or "unknown"


def said_by(*command: str) -> str:
    """Nothing, if there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def rates(device: str, dtypes: list[str]) -> dict:
    """GB/s read and written by the faster of two passes; GFLOP/s of a square product in each dtype; a GPU's clock.

    Where PyTorch multiplies half precision slower than float32, as on a CPU without instructions for it, the rate is
    that of float32: nothing keeps a kernel from converting first.
    """
    a, b = (torch.ones(COPIED[device] // 4, device=device) for _ in range(2))
    passes = (partial(a.copy_, b), partial(a.add_, 1))  # caches read what a copy overwrites, too
    found = {"gbytes": _digits(2 * a.nbytes / min(_seconds(run, device) for run in passes) / 1e9), "gflops": {}}
    del a, b
    side = PRODUCT[device]
    for dtype in sorted({*dtypes, "float32"}, key=lambda name: name != "float32"):
        x, y, z = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(3))
        seconds = _seconds(partial(torch.mm, x, y, out=z), device)
        found["gflops"][dtype] = max(_digits(2 * side**3 / seconds / 1e9), found["gflops"].get("float32", 0.0))
    return found | ({"sm_clock": of_gpu("clocks.sm")} if device == "cuda" else {})


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def _seconds(run: Callable[[], object], device: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(SAMPLES))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
