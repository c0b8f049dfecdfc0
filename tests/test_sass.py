"""The machine code of every CUDA kernel: no spills, no atomics, tensor cores and wide accesses where they belong.

Needs nvcc, cuobjdump and nvdisasm, and no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import sass
from checks import EVERYTHING
from machine_code import Kernel, name_of
from problems import MODELS
from relpos_cuda import _build, _loader
from sass import Usage
from sass_rules import RULES

needs_tools = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing() or "all there")
each_arch = pytest.mark.parametrize("arch", sass.ARCHS)

HALF = [t for t in sass.HEAD_DIMS if t != "float32"]
PAIRS = [("float32", "float32"), *((t, t) for t in HALF), *(("float32", t) for t in HALF)]  # logits, q
KERNELS = {
    "table_sum",
    *(f"{name} {s} {t}{cores}" for name in ("logits_fwd", "logits_bwd") for s, t in PAIRS for cores in ("", " mma")),
    *(f"table_partial {t}{cores}" for t in ("float32", *HALF) for cores in ("", " mma")),
} - {f"{name} float32 mma" for name in ("logits_fwd float32", "logits_bwd float32", "table_partial")}
TILES = {
    (t, d): ("8 line", "6 line", "8") if dims[-1] > 64 else ("8 line", "8")
    for t, dims in sass.HEAD_DIMS.items()
    if t != "float32"
    for d in dims
}
WINDOW_TABLES = {"fwd_window": (" 1", " 1 whole", " 2", " 2 whole"), "bwd_window": ("", " whole")}
TILES |= {("float32", d): ("4" if d <= 64 else "2",) for d in sass.HEAD_DIMS["float32"] if d != 112}
KERNELS |= {
    *(
        f"attention_{name} {t} {d} {k}"
        for name in ("fwd", "bwd_queries")
        for (t, d), tiles in TILES.items()
        for k in tiles
    ),
    *(f"attention_bwd_keys {t} {d}" for t, d in TILES),
    *(
        f"attention_{name} {t} {d}{tables}"
        for t, d in TILES
        if t != "float32"
        for name in (["fwd_window"] if d <= 96 else []) + (["bwd_window"] if d <= 80 else [])
        for tables in WINDOW_TABLES[name]
    ),
}
OF_ARCH = dict.fromkeys(sass.ARCHS, KERNELS)
OF_ARCH["90a"] = KERNELS | {
    *(
        f"attention_{name}_sm90 {t} {d} {k}"
        for name in ("fwd", "bwd_queries")
        for (t, d), tiles in TILES.items()
        if t in HALF
        for k in tiles
    ),
    *(f"attention_bwd_keys_sm90 {t} {d}" for t, d in TILES if t in HALF),
}
THREADS = 256


@dataclass(frozen=True)
class Built:
    library: Path
    kernels: dict[str, list[Kernel]]  # of each architecture
    usage: list[Usage]
    complaints: list[str]


@pytest.fixture(scope="session")
def built() -> Built:
    library: Path = sass.library()
    log = (library.parent / "ptxas.log").read_text()
    kernels = {arch: sass.kernels_of(library, arch) for arch in sass.ARCHS}
    return Built(library, kernels, sass.usage_of(log), sass.complaints(log))


@needs_tools
@pytest.mark.slow
@each_arch
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_machine_code(built: Built, arch: str, rule: Callable[[Kernel], Iterator[str]]):
    faults = [f"{kernel}: {fault}" for kernel in built.kernels[arch] for fault in rule(kernel)]
    assert not faults, "\n".join(faults)


@needs_tools
@pytest.mark.slow
@each_arch
def test_every_kernel_is_there(built: Built, arch: str):
    assert {str(k) for k in built.kernels[arch]} == OF_ARCH[arch]
    assert len(built.kernels[arch]) == len(OF_ARCH[arch])
    assert min(len(k.code) for k in built.kernels[arch]) > 100, "the parser met a format it does not know"


def assert_it_loads(library: Path, archs: tuple[str, ...]) -> None:
    """Without a GPU, beside any PyTorch, and with every op."""
    assert _build.archs_of(library) == archs
    code = f"""
import torch, relpos_cuda
torch.ops.load_library({str(library)!r})
for op in relpos_cuda._ops.SCHEMAS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("relpos_cuda::" + op, "CUDA"), op
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_tools
@pytest.mark.slow
def test_the_library_loads(built: Built):
    assert_it_loads(built.library, sass.ARCHS)


@pytest.mark.slow
@pytest.mark.skipif(bool(sass.no_nvcc()), reason=sass.no_nvcc())
@pytest.mark.skipif(not EVERYTHING, reason="`make test-all` builds for them")
def test_other_architectures():
    """With head dimensions of the attention of an even and an odd number of steps."""
    library = sass.library(sass.OTHER_ARCHS, dict.fromkeys(sass.HEAD_DIMS, (64, 80)))
    assert_it_loads(library, sass.OTHER_ARCHS)
    log = (library.parent / "ptxas.log").read_text()
    usage = sass.usage_of(log)
    assert len(usage) == log.count("Compiling entry function") > 0
    assert {u.arch for u in usage} == set(sass.OTHER_ARCHS)
    few_words = "attention_bwd_window_kernelI\\w+Li80E"  # of sm_100 and 120, outside of its loops over keys
    local = [u for u in usage if u.local_bytes > (40 if re.search(few_words, u.mangled) else 0)]
    assert [f"{u.mangled} on sm_{u.arch}: {u.memory}" for u in local] == []
    assert sass.complaints(log) == []


@needs_tools
@pytest.mark.slow
def test_registers_spills_and_warnings(built: Built):
    assert len(built.usage) == sum(map(len, OF_ARCH.values()))
    assert built.complaints == []
    for u in built.usage:
        assert u.local_bytes == 0, f"{u.mangled} on sm_{u.arch}: {u.memory}"
        if not (name := name_of(u.mangled)).startswith("attention"):
            least = 4 if name.startswith("logits") and name.endswith("mma") else 3
            blocks = sass.blocks_per_sm(u.arch, THREADS, u.registers)
            assert blocks >= least, f"{name} on sm_{u.arch}: {blocks} blocks with {u.registers} registers"


@pytest.fixture(scope="module")
def planner():
    planner = _loader.plan()
    if planner is None:
        pytest.skip("no planner: see the warning")
    return planner


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("arch", sass.ARCHS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_two_blocks_of_every_model_share_an_sm(built: Built, planner, arch: str, direction: str):
    """By the shared memory of the plan and the registers of the kernel it names."""
    registers = {name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    for problem in MODELS:
        for logits, q in PAIRS:
            sizes = (problem.batch * problem.heads, problem.q_size, problem.k_size, problem.head_dim, problem.prefix)
            p = planner.plan_logits(direction, q, *sizes, int(arch.rstrip("a")))
            assert (p.refusal, p.threads) == ("", THREADS)
            name, variant = p.kernel.rsplit("_", 1)
            kernel = f"{name} {logits} {q}{' mma' if variant == 'mma' else ''}"
            blocks = sass.blocks_per_sm(arch, THREADS, registers[kernel], p.shared_bytes)
            assert blocks >= 2, f"{problem}: {blocks} blocks of {kernel}, {p.shared_bytes} bytes"


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("arch", sass.ARCHS)
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_eight_warps_of_attention_fill_an_sm(built: Built, planner, arch: str, kernel: str):
    """Each takes nearly all registers a thread may have."""
    registers = {name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    for head_dim in (64, 80, 96):
        p = planner.plan_attention(kernel, "bfloat16", 16, (64, 64), (64, 64), head_dim, 0, int(arch.rstrip("a")), 0.1)
        variant = "" if kernel == "backward_keys" else " 8 line"
        name = f"attention_{kernel.replace('forward', 'fwd').replace('backward', 'bwd')} bfloat16 {head_dim}{variant}"
        blocks = sass.blocks_per_sm(arch, p.threads, registers[name], p.shared_bytes)
        assert blocks * p.threads >= 8 * 32, f"{blocks} blocks of {name}, {p.shared_bytes} bytes"


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("head_dim,arch", [(64, "90a"), (80, "90a")])
def test_an_sm_has_room_for_two_windows_forward(built: Built, planner, head_dim: int, arch: str):
    """sm_80 has room for one, which then has all queries in one pass."""
    registers = {name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    window = (14, 14)
    p = planner.plan_attention("forward_window", "bfloat16", 1, window, window, head_dim, 0, int(arch.rstrip("a")), 0.1)
    assert (p.refusal, p.threads, p.grid) == ("", 7 * 32, 1)
    of_thread = registers[f"attention_fwd_window bfloat16 {head_dim} 2 whole"]
    assert sass.blocks_per_sm(arch, p.threads, of_thread, p.shared_bytes) >= 2


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("head_dim,arch", [(64, "80"), (64, "90a"), (80, "90a")])
def test_an_sm_has_room_for_a_window(built: Built, planner, head_dim: int, arch: str):
    """D 80 takes more shared memory than sm_80 has: two kernels, there."""
    registers = {name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    window = (14, 14)
    p = planner.plan_attention(
        "backward_window", "bfloat16", 1, window, window, head_dim, 0, int(arch.rstrip("a")), 0.1
    )
    assert (p.refusal, p.threads) == ("", 7 * 32)
    name = f"attention_bwd_window bfloat16 {head_dim}" + (" whole" if arch == "90a" else "")
    assert sass.blocks_per_sm(arch, p.threads, registers[name], p.shared_bytes) >= 1


@needs_tools
@pytest.mark.slow
@each_arch
def test_factors_are_found_in_few_instructions(built: Built, arch: str):
    """Of the loop over 32 table rows, lookups included: twice as many before rows came by 16 bytes."""
    seen = 0
    for kernel in built.kernels[arch]:
        name, dtype, head_dim = str(kernel).split()[:3] if kernel.attention else ("", "", "0")
        passing = re.fullmatch("attention_(fwd|bwd_queries)(_sm90)?", name)
        if passing and dtype in HALF and int(head_dim) <= 96:
            loop = kernel.product_loop(4 * int(head_dim) // 16, "HMMA")
            assert loop is not None and len(kernel.within(loop)) <= 10 * 32, f"{kernel}: {loop and len(loop.body)}"
            seen += 1
    assert seen >= 18


@needs_tools
@pytest.mark.slow
@each_arch
def test_what_the_bias_costs(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Instructions of the forward's loop over tiles of keys: at most 1.2 times those without a bias.

    For sm_90, 1.4 times with many lines in a tile, each of which is looked up and added: there is less else to do.
    """
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch)
    with ThreadPoolExecutor(2) as pool:
        ways = [(arch, tmp_path / "with"), (arch, tmp_path / "without", "-DRELPOS_WITHOUT_BIAS")]
        with_bias, without = pool.map(lambda way: sass.forward_loops(*way), ways)
    assert with_bias.keys() == without.keys() and len(with_bias) == (5 if arch == "90a" else 3)
    for name, instructions in with_bias.items():
        ratio = instructions / without[name]
        with capsys.disabled():
            print(f"\n  sm_{arch} {name}: {instructions:.1f} instructions per logit of a thread, {ratio:.2f} x", end="")
        assert 1 < ratio <= (1.4 if "sm90" in name and not name.endswith("line") else 1.2)
