"""The logits op against the formula, in one interleaved run: ``python -m benchmarks [--help]``.

Every peer gets the same logits, q and tables, and makes bias and sum from them. Gathers and einsums are inside the
timed region for all. Each round runs every peer once; the table shows medians and their ratios.

    bare add_(1), bare add(1)    one pass over the same memory: what no work in place, or out of place, can beat
    ours, in place / out of place
    eager                        (attn.view + rel_h) + rel_w, as segment_anything and its descendants write it
    eager, in place              the same with add_, as MViT writes it
    compiled                     eager under torch.compile
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import relpos_cuda
from relpos_cuda import reference

from .cases import CASES, Case

Peer = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def eager(attn: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size, k_size, inplace=False) -> Tensor:
    grid = q.view(-1, *q_size, q.shape[-1])
    rel_h = torch.einsum("bhwc,hkc->bhwk", grid, reference.get_rel_pos(q_size[0], k_size[0], rel_pos_h))
    rel_w = torch.einsum("bhwc,wkc->bhwk", grid, reference.get_rel_pos(q_size[1], k_size[1], rel_pos_w))
    on_grids = attn.view(-1, *q_size, *k_size)
    if inplace:
        on_grids.add_(rel_h[..., None]).add_(rel_w[..., None, :])
        return attn
    return (on_grids + rel_h[..., None] + rel_w[..., None, :]).view(attn.shape)


class Intermediate(torch.autograd.Function):
    """Makes a leaf an intermediate result without a copy, so that in-place peers may write into it."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def peers_of(case: Case, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Peer]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    attn = normal(case.groups, case.rows, case.columns)
    grad = normal(case.groups, case.rows, case.columns)
    q = normal(case.groups, case.rows, case.head_dim).requires_grad_()
    tables = [
        (normal(2 * max(a, b) - 1, case.head_dim) * case.head_dim**-0.5).requires_grad_()
        for a, b in zip(case.q_size, case.k_size, strict=True)
    ]
    grids = (case.q_size, case.k_size)
    ours = relpos_cuda.add_decomposed_rel_pos

    def forward(function, **more) -> Peer:
        def run():
            with torch.no_grad():
                function(attn, q, *tables, *grids, **more)

        return run

    def both(function, **more) -> Peer:
        def run():
            leaf = attn.detach().requires_grad_()
            out = function(Intermediate.apply(leaf), q, *tables, *grids, **more)
            torch.autograd.grad(out, (leaf, q, *tables), grad)

        return run

    check(case, attn, q, tables)
    peers = {
        "forward": {
            "bare add_(1)": lambda: attn.add_(1),
            "bare add(1)": lambda: attn + 1,
            "ours, in place": forward(ours, inplace=True),
            "ours, out of place": forward(ours),
            "eager": forward(eager),
            "eager, in place": forward(eager, inplace=True),
        },
        "forward + backward": {
            "ours, in place": both(ours, inplace=True),
            "ours, out of place": both(ours),
            "eager": both(eager),
            "eager, in place": both(eager, inplace=True),
        },
    }
    if compiled:
        torch._dynamo.reset()
        peers["forward"]["compiled"] = forward(torch.compile(eager, dynamic=False))
        peers["forward + backward"]["compiled"] = both(torch.compile(eager, dynamic=False))
    return {f"{direction}: {name}": peer for direction, group in peers.items() for name, peer in group.items()}


def check(case: Case, attn: Tensor, q: Tensor, tables: list[Tensor]) -> None:
    """Right before fast: the first group against float64."""
    one = [t.detach() for t in (attn[:1], q[:1], *tables)]
    exact = eager(*(t.double() for t in one), case.q_size, case.k_size)
    got = relpos_cuda.add_decomposed_rel_pos(*one, case.q_size, case.k_size)
    error = ((got.double() - exact).norm() / exact.norm()).item()
    allowed = 4 * torch.finfo(attn.dtype).eps
    if not error <= allowed:
        raise SystemExit(f"{case}: wrong result, relative error {error:.1e}")


def measure(peers: dict[str, Peer], rounds: int, device: str) -> dict[str, list[float]]:
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


def row_of(case: Case, dtype: str, times: dict[str, list[float]]) -> dict:
    return {
        "case": case.name,
        "dtype": dtype,
        "shape": str(case),
        "milliseconds": {name: round(statistics.median(t), 3) for name, t in times.items()},
        "spread": {name: [round(min(t), 3), round(max(t), 3)] for name, t in times.items()},
    }


def print_row(row: dict) -> None:
    print(f"\n{row['shape']}, {row['dtype']}")
    ms = row["milliseconds"]
    for name, median in ms.items():
        direction = name.split(":")[0]
        ratio = ms[f"{direction}: eager"] / median
        low, high = row["spread"][name]
        print(f"  {name:40} {median:9.2f} ms   [{low:.2f}, {high:.2f}]   {ratio:6.2f} x eager's speed")
    print(
        f"  in place over a bare add_(1): {ms['forward: ours, in place'] / ms['forward: bare add_(1)']:.2f} x its time"
    )


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
    for name in options.cases:
        for dtype in options.dtypes:
            peers = peers_of(CASES[name], DTYPES[dtype], options.device, options.compiled)
            row = row_of(CASES[name], dtype, measure(peers, options.rounds, options.device))
            report["rows"].append(row)
            print_row(row)
            sys.stdout.flush()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0
