"""Planted bugs: one line of the real kernels is broken at a time, and the emulated tests must notice.

Every barrier is a canary by itself; the others are bounds, indices and signs that a slip could change. A canary that
survives must be explained below, or a test is missing. Ten minutes on two cores, so `make canaries` runs it and
`make test` does not.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import emulator
from simt import toolchain

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
QUICK = "(tiny or random or misaligned or table_gradients) and emulated and not (longer or one_row)"
LONG = "tiny and emulated and (longer or one_row)"
ROUNDS = [("fifo", QUICK), ("lifo", QUICK), ("fifo", LONG)]  # a race shows under one schedule or the other

pytestmark = [
    pytest.mark.canary,
    pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing())),
]


@dataclasses.dataclass(frozen=True)
class Canary:
    file: str  # below csrc/cuda
    line: int  # from 0
    original: str
    broken: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line + 1}: {self.original.strip()}"


# (file, text of the real code, what a slip would make of it)
SLIPS = [
    ("tile/bias.cuh", "row >= tile.count || l > high", "l > high"),
    ("tile/bias.cuh", "l - axis.first_row]", "l]"),
    ("tile/bias.cuh", "if (key >= 0) tile", "tile"),
    ("tile/bias.cuh", "d + 8 < D", "true"),
    ("tile/bias.cuh", "min(l, high)", "l"),
    ("tile/bias.cuh", "row < tile.count && d < p.shape.D", "row < tile.count"),
    ("tile/rows.cuh", "m = static_cast<int>(row - group * s.M())", "m = static_cast<int>(row)"),
    ("tile/rows.cuh", "token = m - s.prefix", "token = m"),
    ("tile/rows.cuh", "group % s.heads * q.head", "group * q.head"),
    ("tile/rows.cuh", "if (c < 0) continue;", ""),
    ("tile/rows.cuh", "keys + keys - 1]", "keys]"),
    ("tile/mma.cuh", "low = from_float<T>(x - to_float(high));", "low = from_float<T>(0.f);"),
    ("tile/mma.cuh", "lane / 4 + e / 2 * 8", "lane / 4"),
    ("tile/copy.cuh", "x[i] = i < left ?", "x[i] = true ?"),
    ("logits_fwd.cuh", "n -= p.shape.prefix;", ";"),
    ("logits_fwd.cuh", "++j == keys_w", "++j > keys_w"),
    ("logits_fwd.cuh", "j + COUNT <= keys_w", "true"),
    ("logits_fwd.cuh", "if (p.shape.prefix)  // class", "if (false)  // class"),
    ("logits_fwd.cuh", "for (int e = vectors * V + threadIdx.x; e < elements", "for (int e = elements; e < elements"),
    ("logits_bwd.cuh", "o < keys_o ? load_stream", "true ? load_stream"),
    ("logits_bwd.cuh", "first ? sum : outer[r] + sum;", "sum;"),
    ("logits_bwd.cuh", "at + V <= to.end", "true"),
    ("logits_bwd.cuh", "j0 + c * 32 + lane] = column", "c * 32 + lane] = column"),
    ("logits_bwd.cuh", "row < count ? rows[row].coordinate[a] : -1", "rows[row].coordinate[a]"),
    ("logits_bwd.cuh", "c >= 0 && l <= high_row", "c >= 0"),
    ("logits_bwd.cuh", "if (row < count) dq", "dq"),
    ("table_grad.cuh", "u0 + query < block.end", "true"),
    ("table_grad.cuh", "exists && i0 + i < axis.keys", "exists"),
    ("table_grad.cuh", "exists && d0 + d < p.shape.D", "exists"),
    ("table_grad.cuh", "queries * (blockIdx.y + 1) / p.splits", "queries"),
    ("table_grad.cuh", "if (key < 0) continue;", ""),
    ("table_grad.cuh", "p.shape.prefix + (above", "(above"),
]

# Why no test sees them yet, by their text.
ORDERED = "the emulator lets every warp operation order memory; hardware promises that of __syncwarp only"
PAST_THE_END = "reads past the end and drops what it read: only an address sanitizer would see it"
EXPLAINED = {
    "__syncwarp();": ORDERED,
    "__syncwarp();  // before the next row overwrites `outer`": ORDERED,
    "if (at + V <= to.end) {": PAST_THE_END,
    "const int c = row < count ? rows[row].coordinate[a] : -1;": PAST_THE_END,
    "put_factor(query, i, exists && i0 + i < axis.keys ? factors[i] : 0.f);": PAST_THE_END,
    "put_q(query, d, exists && d0 + d < p.shape.D ? q[d] : from_float<T>(0.f));": PAST_THE_END,
    "const T* table_row = table + static_cast<int64_t>(min(l, high)) * D;": PAST_THE_END,
    "for (int i = 0; i < 4; ++i) x[i] = i < left ? to_float(p[i]) : 0.f;": PAST_THE_END,
}


def canaries() -> list[Canary]:
    found = []
    for path in sorted(CUDA.rglob("*.cuh")):
        lines = path.read_text().splitlines()
        file = str(path.relative_to(CUDA))
        for i, line in enumerate(lines):
            if re.match(r"\s*__sync(threads|warp)\(\);", line):
                found.append(Canary(file, i, line, re.sub(r"__sync\w+\(\);", ";", line)))
        for _, text, slip in (s for s in SLIPS if s[0] == file):
            places = [i for i, line in enumerate(lines) if text in line]
            assert places, f"{file} has no line with {text!r} any more"
            found += [Canary(file, i, lines[i], lines[i].replace(text, slip)) for i in places]
    return found


def is_noticed(canary: Canary, folder: Path) -> bool:
    """Whether the tests fail on kernels with this bug; a compile error would not count."""
    for part in ("csrc", "tests/simt"):
        shutil.copytree(ROOT / part, folder / part)
    path = folder / "csrc/cuda" / canary.file
    lines = path.read_text().splitlines()
    lines[canary.line] = canary.broken
    path.write_text("\n".join(lines) + "\n")
    library = folder / "broken.so"
    emulator.compile_tree(folder, library, "-O1", "-g0")
    return any(_fails(library, schedule, tests) for schedule, tests in ROUNDS)


def _fails(library: Path, schedule: str, tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "test_logits.py", "-k", tests]
    environment = os.environ | {emulator.INSTEAD: str(library), "SIMT_SCHED": schedule, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1) or done.returncode < 0, done.stdout + done.stderr  # negative: it crashed
    return done.returncode != 0


@pytest.fixture(scope="module")
def noticed(tmp_path_factory: pytest.TempPathFactory) -> dict[Canary, bool]:
    every = canaries()
    folders = [tmp_path_factory.mktemp("canary") for _ in every]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(every, pool.map(is_noticed, every, folders), strict=True))


def test_every_planted_bug_is_noticed(noticed: dict[Canary, bool], capsys: pytest.CaptureFixture[str]):
    survivors = [canary for canary, seen in noticed.items() if not seen]
    score = 1 - len(survivors) / len(noticed)
    with capsys.disabled():
        print(f"\n{len(noticed) - len(survivors)} of {len(noticed)} planted bugs noticed ({score:.0%})")
        for survivor in survivors:
            print(f"  survived: {survivor} ({EXPLAINED.get(survivor.original.strip(), 'why?')})")
    assert [str(s) for s in survivors if s.original.strip() not in EXPLAINED] == []
