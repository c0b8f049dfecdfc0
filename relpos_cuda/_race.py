"""Variants of a computation, run in turn: seconds, memory, and how far their results are apart."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Steps = dict[str, Callable[[], Tensor]]


@dataclass
class Runs:
    """What was measured of one variant; ``peaks`` in GiB."""

    result: Tensor
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest minus fastest, as a share of the median: what another user of the machine can do."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def distance(self, other: Runs) -> tuple[float, float]:
        """Largest absolute, and relative L2 difference of the results."""
        difference = self.result - other.result
        return difference.abs().max().item(), (difference.norm() / other.result.norm()).item()


def measure(run: Callable[[], Any], device: str) -> tuple[Any, float, float]:
    """Result, seconds, and GiB in use at the peak above those in use before (nan where unknown)."""
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS", forget_peak=True)
    start = time.perf_counter()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")
    return result, seconds, (peak - before) / 2**30


def bytes_of(gibibytes: float) -> int | None:
    """A peak as files of results have it."""
    return None if math.isnan(gibibytes) else round(2**30 * gibibytes)


def _resident(row: str, forget_peak: bool = False) -> float:
    """Bytes of the process in RAM, now (VmRSS) or at the peak (VmHWM); Linux only."""
    try:
        if forget_peak:
            with contextlib.suppress(AttributeError):  # glibc: free memory goes back to the system
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(row))
    except OSError:
        return float("nan")


def race(kind: str, steps: Steps, device: str, rounds: int) -> dict[str, Runs]:
    """All variants in turn, forth and back, after a round that only warms up."""
    from tqdm import tqdm

    results: dict[str, Runs] = {}
    order = list(steps)
    with tqdm(total=(rounds + 1) * len(order), leave=False, disable=None, unit="run") as bar:
        for number in range(rounds + 1):
            for name in order:
                bar.set_description(f"{kind}: {name}")
                result, seconds, peak = measure(steps[name], device)
                if number == 0:
                    results[name] = Runs(result.float().cpu())
                else:
                    results[name].seconds.append(seconds)
                    results[name].peaks.append(peak)
                bar.update()
            order.reverse()
    return {name: results[name] for name in steps}


def table(title: str, results: dict[str, Runs]) -> str:
    """One line per variant; speed-up and differences are those to the first."""
    stock = next(iter(results.values()))
    head = ("seconds", "spread", "speed-up", "peak GiB", "max |diff|", "rel. L2")
    lines = [f"{title:26}" + "".join(f"{h:>11}" for h in head)]
    for name, runs in results.items():
        largest, relative = runs.distance(stock)
        ratio = stock.median / runs.median
        lines.append(
            f"  {name:24}{runs.median:11.4g}{runs.spread:11.0%}{ratio:10.2f}x{max(runs.peaks):11.2f}"
            f"{largest:11.1e}{relative:11.1e}"
        )
    return "\n".join(lines) + "\n"
