"""What the attention on the CPU takes beside its operands: the peak of a process that does nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import relpos_cuda
from problems import NO_WORK_SPACES, Problem, same
from relpos_cuda import _ops, tables

DTYPES = ["float32", "bfloat16", "float16"]
PROBLEMS = {p.name: p for p in [same("one_group", 64, 64, 64, heads=1), same("groups", 48, 48, 80, heads=4)]}
THREADS = 2
PAGES = 2 << 20  # what allocators and threads round up to


def work_bytes(p: Problem, backward: bool) -> int:
    """The most that docs/kernels.md allows. Nothing is as large as queries times keys."""
    groups, sides, table_rows = p.batch * p.heads, sum(p.k_size), sum(2 * n - 1 for n in p.k_size)
    tile = 384 * (3 * p.head_dim + sides)  # q, grad, dq; factors
    strip = 64 * (8 * p.head_dim + 2 * sides + 4 * 256)  # the same, one query per lane; scores and their gradients
    numbers = THREADS * (2 * p.columns * p.head_dim + tile + strip) + 3 * table_rows * p.head_dim
    if backward:
        tasks = groups * min(8, -(-24 // groups))  # each with dk, dv and a gradient of the table of its own
        numbers += tasks * (2 * p.columns + table_rows) * p.head_dim
    return 4 * numbers


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_work_memory(problem: Problem, dtype: str):
    environment = os.environ | {"PYTHONPATH": str(Path(relpos_cuda.__file__).parent.parent)}
    command = [sys.executable, __file__, problem.name, dtype]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, backward = map(int, done.stdout.split())
    allowed = [work_bytes(problem, False) + PAGES, work_bytes(problem, True) + PAGES]
    scores = 2 * problem.rows * problem.columns  # of one group, in half precision
    assert allowed[0] < scores and allowed[1] < 2 * problem.heads * scores
    assert forward <= allowed[0], f"forward took {forward} bytes, allowed {allowed[0]}"
    assert backward <= allowed[1], f"backward took {backward} bytes, allowed {allowed[1]}"


def peak_growth(run: Callable[[], None]) -> int:
    def kilobytes(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before)


def main(name: str, dtype_name: str) -> None:
    """In a process of its own, where no freed memory lies about."""
    p, dtype = PROBLEMS[name], getattr(torch, dtype_name)
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def passes(p: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
        q, k, v, grad, out, dq, dk, dv = (normal(p.batch, p.heads, p.rows, p.head_dim) for _ in range(8))
        table = normal(sum(2 * n - 1 for n in p.k_size), p.head_dim)
        lse, d_table = torch.ones(p.batch * p.heads, p.rows), torch.ones(table.shape)
        rest = (table, tables.lookup(p.q_size, p.k_size, q.device), p.q_size, p.k_size, p.prefix, 0.1)
        return (
            lambda: _ops.attention_fwd(out, lse, q, k, v, *rest),
            lambda: _ops.attention_bwd(
                dq, dk, dv, d_table, grad, q, k, v, out, lse, *rest[:2], *NO_WORK_SPACES, *rest[2:]
            ),
        )

    for warm_up in passes(same("warm_up", 4, 4, 8)):  # the library, the threads
        warm_up()
    print(*map(peak_growth, passes(p)))


if __name__ == "__main__":
    main(*sys.argv[1:])
