"""Measures both ops against their peers: ``python -m benchmarks [--help]``.

The peers of an op take turns in one process: each round runs every one once, and a row has medians and their spread.
Gathers and einsums are inside the timed region for all. Peers: benchmarks/logits.py and attention.py say which.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import attention, logits
from .cases import CASES, Case
from .peers import Peers

OPS = {"logits": logits, "attention": attention}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure(peers: Peers, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every round, peers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for peer in peers.values():
        peer()
    for _ in range(rounds):
        for name, peer in peers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            peer()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def row_of(op: str, case: Case, dtype: str, times: dict[str, list[float]]) -> dict:
    return {
        "op": op,
        "case": case.name,
        "dtype": dtype,
        "shape": str(case),
        "milliseconds": {name: round(statistics.median(t), 3) for name, t in times.items()},
        "spread": {name: [round(min(t), 3), round(max(t), 3)] for name, t in times.items()},
    }


def print_row(row: dict) -> None:
    print(f"\n{row['op']}, {row['shape']}, {row['dtype']}")
    ms, op = row["milliseconds"], OPS[row["op"]]
    for name, median in ms.items():
        direction = name.split(":")[0]
        ratio = ms[f"{direction}: eager"] / median
        low, high = row["spread"][name]
        print(f"  {name:40} {median:9.2f} ms   [{low:.2f}, {high:.2f}]   {ratio:6.2f} x eager's speed")
    ratio = ms[f"forward: {op.OURS}"] / ms[f"forward: {op.LEAST}"]
    print(f"  forward, {op.OURS} over {op.LEAST}: {ratio:.2f} x its time")


def machine(device: str) -> dict:
    described = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    if device == "cuda":
        return described | {"device": torch.cuda.get_device_name()}
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    isa = torch.backends.cpu.get_cpu_capability()
    return described | {"device": models[0] if models else platform.machine(), "isa": isa}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the formula")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()

    torch.manual_seed(0)
    report = {"machine": machine(options.device), "commit": commit(), "rounds": options.rounds, "rows": []}
    print(json.dumps(report["machine"]))
    for op, case, dtype in itertools.product(options.ops, options.cases, options.dtypes):
        peers = OPS[op].peers_of(CASES[case], DTYPES[dtype], options.device, options.compiled)
        row = row_of(op, CASES[case], dtype, measure(peers, options.rounds, options.device))
        report["rows"].append(row)
        print_row(row)
        sys.stdout.flush()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0
