"""Measures both ops against every other way to compute them: ``python -m relpos_cuda bench [--help]``.

What runs, one after the other, each part into the same JSON file as soon as it is done:

    ops        named shapes, all peers in turns (protocol.py); attention.py and logits.py say who they are
    lengths    time and memory of a layer up to 192 x 192 tokens (lengths.py)
    encoders   image encoders as shipped and with our kernels (encoders.py)
    host       what a call costs the host, whatever it computes (host.py)

Then tables are printed, and plots drawn from the file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import attention, encoders, host, lengths, logits, machine, optional, peers, protocol, report
from .cases import CASES, COMPILED_ON_GPU, DTYPES, ON_CPU, QUICK
from .progress import Progress

Found = Iterator[dict[str, list[dict]]]  # more rows for each list of the file

OPS = {"attention": attention, "logits": logits}
PARTS = ("ops", "lengths", "encoders", "host")


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.plot:
        return draw_plots(options.plot, options.out)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "bench.json"
    result = {"about": machine.about(options.device), "rates": [machine.rates(options.device, options.dtypes)]}
    result |= {"rows": [], "refused": [], "lengths": [], "encoders": [], "host": []}
    print(report.heading(result), flush=True)
    shapes = len(options.ops) * len(options.cases) * len(options.dtypes)
    with Progress(sum(shapes if part == "ops" else 1 for part in options.parts)) as progress:
        for found in (found for part in options.parts for found in PART[part](options, progress)):
            for key, rows in found.items():
                result[key] += rows
            file.write_text(json.dumps(result, indent=1) + "\n")
            progress.done()
            print(report.text_of(found, result), flush=True)
        result["rates"].append(machine.rates(options.device, options.dtypes))
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(report.rates_line(result))
    print(file)
    return draw_plots(file, options.out) or int(ours_is_wrong_or_missing(result, options))


def ours_is_wrong_or_missing(result: dict, options: argparse.Namespace) -> bool:
    rows = [row for row in result["rows"] if row["peer"].startswith("ours")]
    found = {(row["op"], row["case"], row["dtype"], row["pass"]) for row in rows if row["peer"] == OPS[row["op"]].OURS}
    asked = itertools.product(options.ops, options.cases, options.dtypes, options.passes)
    return any(row.get("wrong") for row in rows) or ("ops" in options.parts and not found.issuperset(asked))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m relpos_cuda bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="within a minute: one layer, one dtype, nothing compiled")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="(all; with --quick, ops)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "all"], help=f"(all; on a CPU: {' '.join(ON_CPU)})")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="(bfloat16; on a CPU: float32, and bfloat16 if it knows that)"
    )
    parser.add_argument("--passes", nargs="+", choices=protocol.PASSES, help="(all; on a CPU, not backward alone)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes, minutes of it")
    parser.add_argument("--mma-sync", action="store_true", help="on sm_90, also the kernels of every architecture")
    parser.add_argument("--seconds", type=float, help="of the rounds of one case (2; 8 on a CPU)")
    parser.add_argument("--rounds", type=int, help="of peers, at least (3), and of encoders (10; 1 on a CPU)")
    parser.add_argument("--memory", type=float, help="GiB that a peer may take in `lengths` (a GPU's; 12 on a CPU)")
    parser.add_argument("--peers", type=Path, help="a folder with kernels of others (optional.py says which)")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of bench.json and the plots (bench)")
    parser.add_argument("--plot", type=Path, help="measure nothing, draw the plots of this file")
    return with_defaults(parser.parse_args(arguments))


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """What is not given depends on the device and on --quick."""
    on_cpu, quick = options.device == "cpu", options.quick
    cases = QUICK if quick else ON_CPU if on_cpu else CASES
    options.cases = list(CASES) if options.cases == ["all"] else options.cases or list(cases)
    options.dtypes = options.dtypes or (dtypes_of_cpu()[: 1 if quick else 2] if on_cpu else ["bfloat16"])
    options.passes = options.passes or [p for p in protocol.PASSES if not (on_cpu and p == protocol.BACKWARD)]
    options.seconds = options.seconds or (1 if quick else 8 if on_cpu else 2)
    options.rounds_of_encoders = options.rounds
    options.rounds = options.rounds or (2 if quick else 3)
    options.no_compile |= quick
    options.parts = options.parts or (PARTS[:1] if quick else PARTS)
    options.mma_sync &= on_cpu or torch.cuda.get_device_capability() == (9, 0)
    options.sides = (14, 28) if quick else lengths.SIDES
    options.patience = 1.0 if quick else 10.0
    total = 12.0 if on_cpu else torch.cuda.get_device_properties(0).total_memory / 2**30
    options.memory = options.memory or total
    return options


def dtypes_of_cpu() -> list[str]:
    """Without instructions for bfloat16, PyTorch takes minutes for what float32 does in a second."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ["float32", *(["bfloat16"] if fast else [])]


# ---- the parts


def run_ops(options: argparse.Namespace, progress: Progress) -> Found:
    effort = protocol.Effort(options.seconds, options.rounds, passes=tuple(options.passes))
    for op, case, dtype in itertools.product(options.ops, options.cases, options.dtypes):
        with peers.no_compiled_leftovers():
            compiled = not options.no_compile and (options.device == "cpu" or case in COMPILED_ON_GPU)
            found = OPS[op].peers_of(CASES[case], options.device, compiled)
            if options.mma_sync and op == "attention":
                found.insert(1, attention.peer("ours, mma.sync", attention.ours, around=attention.without_wgmma))
            missing: peers.Refusals = {}
            if options.peers and op == "attention":
                more, missing = optional.peers_of(options.peers, CASES[case])
                found += more
            progress.title = f"{op}, {case}, {dtype}"
            rows, refused = protocol.bench(OPS[op], CASES[case], dtype, options.device, found, effort, progress)
        about = {"op": op, "case": case, "dtype": dtype}
        refused = [about | {"peer": peer, "reason": reason} for peer, reason in (missing | refused).items()]
        yield {"rows": rows, "refused": refused}


def run_lengths(options: argparse.Namespace, progress: Progress) -> Found:
    progress.title = "lengths"
    if options.device == "cuda":  # peers have processes of their own, which share the memory with this
        gc.collect()
        torch.cuda.empty_cache()
    limits = options.memory, options.patience
    yield {"lengths": lengths.measured(options.device, options.dtypes[0], *limits, options.sides, progress)}


def run_encoders(options: argparse.Namespace, progress: Progress) -> Found:
    progress.title = "encoders"
    what = options.device, options.dtypes, options.quick
    yield {"encoders": encoders.measured(*what, progress, options.rounds_of_encoders)}


def run_host(options: argparse.Namespace, progress: Progress) -> Found:
    progress.title = "host"
    yield {"host": host.measured([OPS[op] for op in options.ops], options.device, progress)}


PART = {"ops": run_ops, "lengths": run_lengths, "encoders": run_encoders, "host": run_host}


def draw_plots(file: Path, folder: Path) -> int:
    try:
        from . import plots
    except ImportError as error:
        print(f"no plots: {error.name} is missing: pip install 'relpos_cuda[demo]'", file=sys.stderr)
        return 0
    for path in plots.draw(file, folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
