"""Every function of csrc/cuda/tile/ptx.cuh has become its instruction: the machine code of the probe's kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sass
from benchmarks import gpu_probe, probe_formulas
from machine_code import Kernel, parse
from relpos_cuda import _toolchain
from simt import cases_sm90
from simt.selftest_sm90 import Selftest

needs_tools = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing() or "all there")

LOADS = ("M88.4", "MT88.4", "M88.2", "MT88.2")  # in the order of `enum class Load`
MBARRIER = (r"SYNCS\.EXCH\.64", r"SYNCS\.ARRIVE\.TRANS64 ", r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT")
WARPGROUP = (r"WARPGROUP\.ARRIVE", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", r"FENCE\.VIEW\.ASYNC")


def hgmma(m: re.Match) -> str:
    """m: type, N, whether b is MN-major, whether a is in registers."""
    bf16, tnsp = "" if m[1] == "6__half" else r"\.BF16", r"\.tnspB" if m[3] == "1" else ""
    a = r"R\d+, gdesc\[UR\d+\]" if m[4] == "1" else r"gdesc\[UR\d+\]"
    return rf"HGMMA\.64x{m[2]}x16\.F32{bf16} R\d+, {a}{tnsp}, R\d+"


# By the kernel's mangled name: what must be there.
ALL_ARCHS: dict[str, Callable[[re.Match], tuple[str, ...]]] = {
    r"8LdmatrixILNS_4LoadE(\d)E": lambda m: (rf"LDSM\.16\.{LOADS[int(m[1])]} ",),
    r"3MmaI6__half": lambda m: (r"HMMA\.16816\.F32 ",),
    r"3MmaI13__nv_bfloat16": lambda m: (r"HMMA\.16816\.F32\.BF16 ",),
    r"4Exp2": lambda m: (r"MUFU\.EX2 ",),
    r"10LoadStream": lambda m: (r"LDG\.E\.NA\.128 ",),
    r"7CpAsync": lambda m: (r"LDGSTS\.E\.BYPASS\.128 ", "LDGDEPBAR", r"DEPBAR\.LE SB0, 0x0"),
}
HOPPER: dict[str, Callable[[re.Match], tuple[str, ...]]] = {
    r"8StmatrixILb(\d)": lambda m: (rf"STSM\.16\.{LOADS[int(m[1])]} ",),
    r"5Relay": lambda m: (r"BAR\.SYNC\S* 0x1, 0x80", r"BAR\.ARV 0x1, 0x80", r"BAR\.ARV 0x2, 0x80"),
    r"3TmaILi(\d)": lambda m: (*MBARRIER, r"FENCE\.VIEW\.ASYNC", rf"UTMALDG\.{m[1]}D "),
    r"5WgmmaI(\w+?)Li(\d+)ELb(\d)ELb(\d)": lambda m: (*WARPGROUP, hgmma(m)),
    r"8Pipeline": lambda m: (
        *MBARRIER,
        r"SYNCS\.ARRIVE\.TRANS64\.A1T0",  # an arrival without bytes
        r"USETMAXREG\.DEALLOC\.CTAPOOL 0x18",
        r"USETMAXREG\.TRY_ALLOC\.CTAPOOL \S+, 0xf0",
        r"UTMALDG\.2D ",
        r"HGMMA\.64x64x16\.F32 R\d+, gdesc\[UR\d+\]\.tnspB",
    ),
}


def faults(kernel: Kernel, rules: dict[str, Callable[[re.Match], tuple[str, ...]]]) -> list[str]:
    (found,) = [(m, wanted) for pattern, wanted in rules.items() if (m := re.search(pattern, kernel.mangled))]
    lines = [f"{i.opcode} {i.operands}" for i in kernel.code]
    wanted = found[1](found[0])
    missing = [f"no {w}" for w in wanted if not any(re.match(w, line) for line in lines)]
    others = [line for line in lines if line.startswith("HGMMA") and not any(re.match(w, line) for w in wanted)]
    return [f"{kernel.mangled}: {fault}" for fault in (*missing, *others)]


@dataclass(frozen=True)
class Built:
    library: Path
    log: str


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    library = tmp_path_factory.mktemp("probe") / "gpu.so"
    return Built(library, gpu_probe.compile_for_gpu(library, sass.ARCHS, "-Xptxas", "-v"))


@pytest.mark.slow
@pytest.mark.skipif(bool(sass.no_nvcc()), reason=sass.no_nvcc())
def test_the_probe_compiles_for_gpus(built: Built):
    assert {b"sm_80", b"sm_90a"} <= set(re.findall(rb"sm_\d+a?", built.library.read_bytes()))
    if _toolchain.visible_capabilities():
        return  # the script's probe step asks it
    with pytest.raises(RuntimeError, match="CUDA driver|no CUDA-capable device"):
        gpu_probe.load(built.library)("load_stream", torch.zeros(32, 4, dtype=torch.int32))
    complaint = cases_sm90.relay(Selftest(built.library)).complaint
    assert re.search("CUDA driver|no CUDA-capable device", complaint or "")


@pytest.mark.slow
@pytest.mark.skipif(bool(sass.no_nvcc()), reason=sass.no_nvcc())
def test_nothing_spills_and_no_wgmma_waits_for_another(built: Built):
    usage = sass.usage_of(built.log)
    assert len(usage) == 2 * (len(probe_formulas.PROBES) + 9 + 4 * 2 * len(cases_sm90.WIDTHS))
    assert sass.complaints(built.log) == []
    assert [u for u in usage if u.local_bytes] == []


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_every_wrapper_has_become_its_instruction(built: Built, arch: str):
    kernels = sass.kernels_of(built.library, arch)
    hopper = [k for k in kernels if "selftest" in k.mangled]
    assert (len(hopper), len(kernels) - len(hopper)) == (9 + 4 * 2 * len(cases_sm90.WIDTHS), len(probe_formulas.PROBES))
    assert [fault for k in kernels if k not in hopper for fault in faults(k, ALL_ARCHS)] == []
    if arch == "90a":
        assert [fault for k in hopper for fault in faults(k, HOPPER)] == []
    else:
        assert max(len(k.code) for k in hopper) < 20, "empty"


CODE = """
		Function : _ZN8selftest6kernelINS_5WgmmaI6__halfLi80ELb1ELb0EEEEEvNS_6ParamsE
        /*0010*/                   WARPGROUP.ARRIVE ;                                       /* 0x0 */
        /*0020*/                   FENCE.VIEW.ASYNC.S ;                                     /* 0x0 */
        /*0030*/                   HGMMA.64x80x16.F32 R24, gdesc[UR12].tnspB, R24, gsb0 ;   /* 0x0 */
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                          /* 0x0 */
"""


@pytest.mark.parametrize(
    ("line", "planted"),
    [
        ("64x80x16", "64x96x16"),
        (".tnspB", ""),
        ("R24, gdesc", "R24, R64, gdesc"),
        ("F32 R24", "F32.BF16 R24"),
        ("WARPGROUP.ARRIVE", "NOP"),
        ("FENCE.VIEW.ASYNC.S", "NOP"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP"),
    ],
)
def test_planted_faults_are_found(line: str, planted: str):
    def found(text: str) -> list[str]:
        (kernel,) = parse(text)
        return faults(kernel, HOPPER)

    assert found(CODE) == []
    assert found(CODE.replace(line, planted)) != []
