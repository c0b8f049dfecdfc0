"""Time and memory of one layer against the length of the sequence, until memory or patience is at its end.

Every peer has a process of its own, in which memory is limited, so that what does not fit is an error there and not
the end of the machine: ``python -m benchmarks.lengths PEER DEVICE DTYPE GIBIBYTES PATIENCE SIDE...`` prints a row of
JSON per length and pass.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from relpos_cuda._race import bytes_of, measure

from . import attention
from .cases import DTYPES, draw, square
from .peers import Call

SIDES = (14, 28, 48, 64, 96, 128, 192)
HEADS, HEAD_DIM = 12, 64  # of ViT-B
PEERS = {
    "cpu": ("ours", "eager, SAM", "sdpa, dense bias", "sdpa, no bias"),
    "cuda": ("ours", "eager, SAM", "sdpa, dense bias, efficient", "flex", "sdpa, no bias, flash"),
}
OUT_OF_MEMORY, OUT_OF_PATIENCE = "out of memory", "not run"
SAMPLES, LONG = 5, 1.0  # seconds; a longer run is measured once


def measured(
    device: str, dtype: str, gibibytes: float, patience: float, sides: tuple[int, ...], progress: Callable
) -> list[dict]:
    rows = []
    for peer in PEERS[device]:
        arguments = [peer, device, dtype, str(gibibytes), str(patience), *map(str, sides)]
        command = [sys.executable, "-m", __spec__.name, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_root()) as process:
            assert process.stdout
            for line in process.stdout:
                rows.append({"peer": peer, "dtype": dtype, **json.loads(line)})
                progress(f"{peer}, {rows[-1]['pass']}, {rows[-1]['side']} x {rows[-1]['side']}")
        if process.returncode:
            rows.append({"peer": peer, "dtype": dtype, "outcome": f"exit code {process.returncode}"})
    return rows


def _root() -> Path:
    """Where this package can be imported from."""
    return Path(__file__).resolve().parents[__spec__.name.count(".")]


# ---- in the process of a peer


def rows_of(peer: str, device: str, dtype: str, gibibytes: float, patience: float, sides: list[int]) -> Iterator[dict]:
    """What would take too long is not run, unless it should take too much memory: then that is tried."""
    last: dict[str, tuple[int, float, float]] = {}  # pass: side, seconds, GiB
    for side in sides:
        torch._dynamo.reset()  # it compiles one function for a few shapes only
        case = square(f"{side}x{side}", 1, HEADS, side, HEAD_DIM)
        found = {p.name: p for p in attention.peers_of(case, device, compiled=peer == "flex")}[peer]
        for direction in ("forward", "forward + backward"):
            row = {"pass": direction, "side": side}
            if direction in last:
                before, *costs = last[direction]
                seconds, peak = (cost * (side / before) ** 4 for cost in costs)
                if seconds > patience and not peak > gibibytes:
                    yield row | {"outcome": f"{OUT_OF_PATIENCE}: about {seconds:.0f} s"}
                    continue
            try:
                with found.around():
                    seconds, peak = cost(found.on(draw(case, DTYPES[dtype], device)), direction, device)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                    raise
                yield row | {"outcome": OUT_OF_MEMORY}
                continue
            last[direction] = (side, seconds, peak)
            yield row | {"milliseconds": float(f"{1e3 * seconds:.4g}"), "peak_bytes": bytes_of(peak)}


def cost(call: Call, direction: str, device: str) -> tuple[float, float]:
    """Median of the seconds, and GiB at the peak; the first run counts only if it is long."""

    def run() -> object:
        if direction == "forward":
            with torch.no_grad():
                return call.forward()
        return call.backward_of(call.forward())

    runs = [measure(run, device)[1:]]
    if runs[0][0] < LONG:
        runs = [measure(run, device)[1:] for _ in range(SAMPLES)]
    seconds, peaks = zip(*runs, strict=True)
    return sorted(seconds)[len(seconds) // 2], max(peaks)


def limit_memory(device: str, gibibytes: float) -> None:
    """Of what is to come: what the process has mapped so far does not count."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gibibytes * 2**30 / total))
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(peer: str, device: str, dtype: str, gibibytes: str, patience: str, *sides: str) -> None:
    warm_up = square("4x4", 1, HEADS, 4, HEAD_DIM)  # libraries and threads
    found = {p.name: p for p in attention.peers_of(warm_up, device, compiled=False)}
    if peer in found:
        cost(found[peer].on(draw(warm_up, DTYPES[dtype], device)), "forward + backward", device)
    limit_memory(device, float(gibibytes))
    limits = float(gibibytes), float(patience)
    for row in rows_of(peer, device, dtype, *limits, [int(side) for side in sides]):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
