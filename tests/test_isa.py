"""Every instruction set that the CPU library was compiled for, on a machine that has it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import problems
import relpos_cuda
import test_logits
from relpos_cuda import _loader

ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def has(isa: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    if isa == "avx512_bf16":
        return capability == "AVX512" and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return isa == "baseline" or capability == "AVX512" or (isa == "avx2" and capability == "AVX2")


@pytest.mark.parametrize("isa", ISAS)
def test_all_tiny_problems(isa: str):
    if not has(isa) or (isa != "baseline" and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip(f"this processor has no {isa}")
    package = Path(relpos_cuda.__file__).parent.parent
    environment = os.environ | {"RELPOS_CUDA_CPU_ISA": isa, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, __file__, isa], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, str(3 * len(problems.TINY))]


def main(isa: str) -> None:
    """In a process of its own, because the choice is made once."""
    import ctypes

    assert _loader.load("cpu")
    library = ctypes.CDLL(str(_loader.status()["cpu"].path))
    library.relpos_cuda_cpu_isa.restype = ctypes.c_char_p
    runs = 0
    for problem in problems.TINY:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            test_logits.compare(problem, dtype, "cpu")
            runs += 1
    print(library.relpos_cuda_cpu_isa().decode(), runs)


if __name__ == "__main__":
    main(sys.argv[1])
