"""What benchmarks/gpu_run.sh runs on a GPU: ``python -m benchmarks.gpu_probe WHAT [MORE ...]``.

WHAT is one of

    probe                every function of csrc/cuda/tile/ptx.cuh: the GPU's bits against those of a formula, to which
                         the tests hold the emulator
    hopper FILE FIRST    a part of it, for itself: the library FILE on the cases of sm_90, from number FIRST on
    tiny                 small problems through every kernel, or those for sm_90 if asked for, for compute-sanitizer
    layers OP ...        a forward and backward of each profiled layer, between cudaProfilerStart and Stop, for ncu
    table FILE           the CSV of ncu, readable
"""

from __future__ import annotations

import csv
import ctypes
import functools
import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT / "tests"))

import relpos_cuda  # noqa: E402
from problems import TINY, Problem, draw, draw_attention, run, run_attention, same  # noqa: E402
from relpos_cuda import _env, _libraries, _loader, _toolchain, support  # noqa: E402
from simt import cases_sm90  # noqa: E402
from simt.selftest_sm90 import Selftest  # noqa: E402

from .cases import CASES  # noqa: E402
from .probe_formulas import PROBES, differs, formula, operands, words_of  # noqa: E402

HERE = Path(__file__).parent
GPU_SOURCES = (HERE / "probe.cu", HERE / "probe_sm90.cu")
NO_SM90 = "no instructions of sm_90a"  # as probe_sm90.cu says
DRAWS = 50
MOST_PROCESSES = 24  # for the cases of sm_90
PATIENCE = 20  # seconds for one of them, or for a process to begin: a product or a copy that hangs says nothing
POISON = 0x7FC0DEAD  # a NaN
SANITIZED = ("ragged_5x13", "ragged_5x13_mma", "window_7x7", "two_class_tokens", "interpolated", "keys_fewer", "video")
SANITIZED_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32))
SANITIZED_SM90 = (
    same("line_of_64", 3, 64, 80, heads=1),
    same("line_of_48", 3, 48, 64, heads=1),
    same("many_lines", 7, 20, 64, heads=2),
    Problem("class_tokens", (5, 9), (4, 11), 96, batch=2, prefix=3),
)
PROFILED = ("sam_b_global", "sam_h_global", "sam_b_windows")
PROFILED_SM90 = ("sam_b_global", "sam_h_global", "mvitv2_stage1")

Probe = Callable[[str, Tensor], Tensor]  # name, words [32, in] -> words [32, out]

# ---- probe


def compile_for_gpu(library: Path, archs: Iterable[str], *more: str) -> str:
    """Returns what nvcc says."""
    flags = ["-std=c++17", "-O3", *_libraries.STABLE_ABI, "-isystem", str(_toolchain.torch().include)]
    flags += [*_toolchain.gencode(tuple(archs)), "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command = [str(_toolchain.nvcc().path), *flags, *more, *map(str, GPU_SOURCES), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def load(library: Path) -> Probe:
    function = ctypes.CDLL(str(library)).probe
    function.restype = ctypes.c_char_p

    def probe(name: str, words: Tensor) -> Tensor:
        out = torch.full((32, PROBES[name][1]), POISON, dtype=torch.int32)
        words = words.contiguous()
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (words, out)]
        complaint = function(name.encode(), pointers[0], words.numel(), pointers[1], out.numel())
        if complaint:
            raise RuntimeError(complaint.decode())
        return out

    return probe


def wrong_words(probe: Probe, name: str, draws: int = DRAWS) -> int:
    """Words of all draws that are not the formula's."""
    generator = torch.Generator().manual_seed(0)
    every = [operands(name, generator) for _ in range(draws)]
    return sum(int(differs(name, probe(name, words_of(name, given)), formula(name, given)).sum()) for given in every)


def compare() -> int:
    """The GPU against the formulas; 1 if a bit differs or it cannot be asked."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "gpu.so")
        try:
            compile_for_gpu(library, _toolchain.archs())
            probe = load(library)
        except (RuntimeError, OSError) as error:
            print(f"not compiled: {error}")
            return 1
        failed = False
        for name in PROBES:
            try:
                wrong = wrong_words(probe, name)
                said = f"{wrong} of {DRAWS * 32 * PROBES[name][1]} words are wrong"
            except RuntimeError as error:
                wrong, said = 1, str(error)
            failed |= wrong > 0
            print(f"{name:22} {said}", flush=True)
        failed |= not hopper_is_right(functools.partial(ask_hopper, library))
    print("FAILED" if failed else "the GPU agrees with the formulas in every bit, and in exp2_approx to 2^-22")
    return int(failed)


def hopper_is_right(ask: Callable[[int], Iterable[str]]) -> bool:
    """All cases of tests/simt/cases_sm90.py; true also of a GPU that has none of these instructions.

    Args:
        ask: Starts a process that says of every case from this number on what is wrong with it, or nothing. After an
            error of CUDA it can say no more, and another goes on.
    """
    names, wrong, at = list(cases_sm90.every_case()), 0, 0
    for _ in range(MOST_PROCESSES):
        before = at
        for said in ask(at):
            if NO_SM90 in said:
                print(f"TMA, wgmma and such: skipped, {NO_SM90}", flush=True)
                return True
            if said:
                wrong += 1
                print(f"{names[at]}: {said}", flush=True)
            at += 1
        if at == before and at < len(names):
            wrong += 1
            print(f"{names[at]}: no answer", flush=True)
            at += 1
        if at == len(names):
            break
    print(f"TMA, wgmma and such: {wrong} of {at} cases are wrong, {len(names) - at} not asked", flush=True)
    return wrong == 0 and at == len(names)


def ask_hopper(library: Path, first: int) -> Iterable[str]:
    """What the process that :func:`answer_hopper` is says, line by line."""
    return lines_of([sys.executable, "-m", "benchmarks.gpu_probe", "hopper", str(library), str(first)])


def lines_of(command: list[str]) -> Iterable[str]:
    """What a process prints; it is killed when it says nothing for too long."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while True:
            overdue = threading.Timer(PATIENCE, process.kill)
            overdue.start()
            line = process.stdout.readline()
            overdue.cancel()
            if not line:
                return
            yield line.rstrip("\n")


def answer_hopper(library: Path, first: int) -> int:
    test = Selftest(library)
    for case in list(cases_sm90.every_case().values())[first:]:
        answer = case(test)
        said = answer.complaint or ("" if answer.right else f"{int((answer.got != answer.want).sum())} wrong")
        print(" ".join(said.split()), flush=True)
        if "CUDA error" in said:
            return 1
    return 0


# ---- tiny, layers


def require_kernels() -> None:
    if not (torch.cuda.is_available() and _loader.load("cuda")):
        raise SystemExit(f"no CUDA kernels: {_loader.status()['cuda']}")


def tiny() -> int:
    require_kernels()
    if _env.WGMMA() == "1":
        return tiny_sm90()
    for problem in (p for p in TINY if p.name in SANITIZED):
        for dtype, attn_dtype in SANITIZED_DTYPES:  # of q, of the logits
            inputs = draw(problem, dtype, attn_dtype)
            got = run(relpos_cuda.add_decomposed_rel_pos, problem, inputs, dtype, "cuda", attn_dtype)
            must_be_finite(got, f"logits, {problem}, {dtype}")
            if problem.head_dim % 8:
                continue  # the attention has no kernel for it
            attended = draw_attention(problem, dtype)
            got = run_attention(relpos_cuda.rel_pos_attention, problem, attended, dtype, "cuda")
            must_be_finite(got, f"attention, {problem}, {dtype}")
        print(problem, flush=True)
    return 0


def tiny_sm90() -> int:
    """With lines of one tile and of many, with class tokens; windows by two kernels, for the one is not for sm_90."""
    with mock.patch.object(support, "backward_in_one_pass", lambda *_: False):
        for problem in SANITIZED_SM90:
            inputs = draw_attention(problem, torch.bfloat16)
            got = run_attention(relpos_cuda.rel_pos_attention, problem, inputs, torch.bfloat16, "cuda")
            must_be_finite(got, f"attention for sm_90, {problem}")
            print(problem, flush=True)
    return 0


def must_be_finite(results: Iterable[Tensor], what: str) -> None:
    torch.cuda.synchronize()
    if not all(t.isfinite().all() for t in (x.cpu() for x in results)):
        raise SystemExit(f"{what}: a result is not finite")


def layers(ops: list[str]) -> int:
    from .run import OPS

    require_kernels()
    for op, name in itertools.product(ops, PROFILED_SM90 if _env.WGMMA() == "1" else PROFILED):
        peers = OPS[op].peers_of(CASES[name], "cuda", compiled=False)
        ours = next(peer for peer in peers if peer.name == OPS[op].OURS)
        call = ours.on(OPS[op].draw(CASES[name], torch.bfloat16, "cuda"))
        call.backward_of(call.forward())  # compiles, loads, allocates
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call.backward_of(call.forward())
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{op}, {CASES[name]}, bfloat16, forward and backward", flush=True)
    return 0


# ---- table

NOTHING_PROFILED = "no kernel was profiled"
COLUMNS = {
    "ID": "id",
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block_dynamic": "shared",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": "tensor",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "sm__maximum_warps_per_active_cycle_pct": "occupancy",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved",
    "Grid Size": "grid",
    "Block Size": "block",
    "Kernel Name": "kernel",
}


def table_of(text: str) -> str:
    """One line per launch of ``ncu --csv --page raw``; the second line of the CSV has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if len(rows) < 2:
        return NOTHING_PROFILED
    units, *launches = rows
    names = [name for name in COLUMNS if name in units]
    table = [[COLUMNS[name] for name in names], [units[name] for name in names]]
    table += [[row[name] or "" for name in names] for row in launches]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def table(file: Path) -> int:
    text = table_of(file.read_text(errors="replace"))
    print(text)
    return int(text == NOTHING_PROFILED)


def main() -> int:
    what, *more = sys.argv[1:] or [""]
    if what in ("probe", "tiny") and not more:
        return {"probe": compare, "tiny": tiny}[what]()
    if what == "hopper" and len(more) == 2:
        return answer_hopper(Path(more[0]), int(more[1]))
    if what == "layers" and more:
        return layers(more)
    if what == "table" and len(more) == 1:
        return table(Path(more[0]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
