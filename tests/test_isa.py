"""Every instruction set that the CPU library is compiled for and the processor has; other processors and compilers."""

from __future__ import annotations

import os
import platform
import shutil
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
    assert run_all({"RELPOS_CUDA_CPU_ISA": isa}) == isa


@pytest.mark.parametrize("processor, compiler", [("another", "c++"), (platform.machine(), "clang++")])
def test_other_builds(processor: str, compiler: str, tmp_path: Path):
    """Without what is for x86 only, as on a Grace or a Jetson; and with the other compiler."""
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    own = {"RELPOS_CUDA_CPU_ISA": "", "RELPOS_CUDA_CACHE_DIR": str(tmp_path), "CXX": compiler}
    own["RELPOS_CUDA_CXXFLAGS"] = "-O1"  # compiled sooner
    best = "baseline" if processor == "another" else next(isa for isa in reversed(ISAS) if has(isa))
    assert run_all(own, processor) == best
    assert [*tmp_path.glob("relpos_cpu-*/librelpos_cpu.so")]


def run_all(variables: dict[str, str], processor: str = platform.machine()) -> str:
    """The instruction set that all tiny problems took, in a process of its own, because the choice is made once."""
    environment = os.environ | {"PYTHONPATH": str(Path(relpos_cuda.__file__).parent.parent)} | variables
    code = f"import platform; platform.machine = lambda: {processor!r}; import test_isa; test_isa.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    isa, runs = done.stdout.split()
    assert int(runs) == 3 * len(problems.TINY)
    return isa


def assert_every_number_survives(dtype: torch.dtype) -> None:
    """A bias of zero, added to all there are; AVX-512-BF16 takes subnormal ones for zero."""
    numbers = torch.arange(1 << 16).to(torch.int16).view(dtype).view(16, 64, 64)
    q, table = torch.zeros(16, 64, 8, dtype=dtype), torch.zeros(15, 8, dtype=dtype)
    got = relpos_cuda.add_decomposed_rel_pos(numbers, q, table, table, (8, 8), (8, 8))
    lost = (got != numbers) & ~(got.isnan() & numbers.isnan())
    assert (got[lost] == 0).all()
    least = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0
    assert (numbers[lost].abs() < least).all()


def main() -> None:
    import ctypes

    assert _loader.load("cpu")
    library = ctypes.CDLL(str(_loader.status()["cpu"].path))
    library.relpos_cuda_cpu_isa.restype = ctypes.c_char_p
    for dtype in (torch.bfloat16, torch.float16):
        assert_every_number_survives(dtype)
    runs = 0
    for problem in problems.TINY:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            test_logits.compare(problem, dtype, "cpu")
            runs += 1
    print(library.relpos_cuda_cpu_isa().decode(), runs)
