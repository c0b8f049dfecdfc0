"""The machine code of every CUDA kernel: no spills, no atomics, tensor cores and wide accesses where they belong.

Needs nvcc, cuobjdump and nvdisasm, and no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import sass
from problems import MODELS
from relpos_cuda import _build, _loader
from sass import Kernel, Usage
from test_install import assert_it_loads

needs_tools = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing() or "all there")
each_arch = pytest.mark.parametrize("arch", sass.ARCHS)

HALF = ("float16", "bfloat16")
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
TILES |= {("float32", d): ("4" if d <= 80 else "2",) for d in sass.HEAD_DIMS["float32"] if d != 112}
KERNELS |= {
    *(
        f"attention_{name} {t} {d} {k}"
        for name in ("fwd", "bwd_queries")
        for (t, d), tiles in TILES.items()
        for k in tiles
    ),
    *(f"attention_bwd_keys {t} {d}" for t, d in TILES),
    *(f"attention_fwd_window {t} {d} {b}" for t, d in TILES if t != "float32" and d <= 96 for b in (1, 2)),
    *(f"attention_bwd_window {t} {d}" for t, d in TILES if t != "float32" and d <= 80),
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
UNROLL = 4  # vectors that a thread has in flight
ATOMICS = ("RED", "REDG", "REDAS", "ATOM", "ATOMG", "ATOMS", "UBLKRED", "UTMAREDG", "SUATOM", "SURED")
LOCAL = ("LDL", "STL", "LD", "ST")  # LD and ST: an address space the compiler could not tell


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


# ---- rules: what is wrong with a kernel, each fault in words


def faults_of_memory(k: Kernel) -> Iterator[str]:
    if found := k.roots(*LOCAL):
        yield f"local or generic memory: {len(found)} of {sorted(set(found))}"
    if found := k.roots(*ATOMICS):
        yield f"atomics: {len(found)} of {sorted(set(found))}"


def faults_of_widths(k: Kernel) -> Iterator[str]:
    if found := [opcode for opcode in k.roots("LDG", "STG") if ".U8" in opcode]:
        yield f"accesses to global memory by bytes: {len(found)}"


def faults_of_tensor_cores(k: Kernel) -> Iterator[str]:
    by_warps = k.tensor_cores and not str(k).startswith("attention_bwd_keys_sm90")  # which has no factors to find
    for root, wanted in (("HMMA", by_warps), ("LDSM", k.loads_matrices)):
        if bool(k.roots(root)) != wanted:
            yield f"{len(k.roots(root))} {root}"
    for root in ("HGMMA", "UTMALDG"):
        if bool(k.roots(root)) != ("_sm90 " in str(k)):
            yield f"{len(k.roots(root))} {root}"
    if bool(k.roots("LDGSTS")) != k.attention:
        yield f"{len(k.roots('LDGSTS'))} copies to shared memory without registers"


def faults_of_warpgroups(k: Kernel) -> Iterator[str]:
    """ptxas 13.0 gives the registers of an operand away, should one be kept through a loop that has another branch."""
    for i in k.code:
        wanted = r"F2FP\..*PACK_AB" if ".tnspB" in i.operands else r"LDSM\..*"  # weights, rows of tokens
        found = set().union(*(k.written_before(i.address, r) for r in i.factors))
        if not all(re.fullmatch(wanted, opcode) for opcode in found):
            yield f"an operand of the HGMMA at {i.address:#x} may come from {sorted(found)}"


def faults_of_waiting(k: Kernel) -> Iterator[str]:
    """What touches the registers of a product that is under way."""
    for product in k.code:
        if product.root != "HGMMA":
            continue
        for i in k.meanwhile(product):
            used = {int(r) for r in re.findall(r"\bR(\d+)", i.operands)} | {*i.written}
            sums_of_others = i.root == "HGMMA" and i.sums == product.sums
            if {*i.written, *i.sums} & {*product.factors} or (used & {*product.sums} and not sums_of_others):
                yield f"{i.opcode} at {i.address:#x} does not wait for the HGMMA at {product.address:#x}"


def faults_of_stream(k: Kernel) -> Iterator[str]:
    if not str(k).startswith("logits"):
        return
    loop = k.stream_loop
    if loop is None:
        yield "no loop reads the logits by 16 bytes"
        return
    inside = k.within(loop)
    loads = [n for n, i in enumerate(inside) if i.streams_in]
    stores = [n for n, i in enumerate(inside) if i.stores_vector]
    if len(loads) != UNROLL or len(stores) != (UNROLL if str(k).startswith("logits_fwd") else 0):
        yield f"{len(loads)} reads and {len(stores)} writes of 16 bytes in the loop"
    use = [n for n, i in enumerate(inside) if i.root in ("FADD", "FFMA", "HADD2", "PRMT", "STG", "STS", "SHFL")]
    if loads and use and max(loads) > min(use):
        yield "a vector is used before all are on their way"


RULES = [
    *(faults_of_memory, faults_of_widths, faults_of_tensor_cores),
    *(faults_of_warpgroups, faults_of_waiting, faults_of_stream),
]


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


@needs_tools
@pytest.mark.slow
def test_the_library_loads(built: Built):
    assert _build.archs_of(built.library) == sass.ARCHS
    assert_it_loads(built.library)


@needs_tools
@pytest.mark.slow
def test_registers_spills_and_warnings(built: Built):
    assert len(built.usage) == sum(map(len, OF_ARCH.values()))
    assert built.complaints == []
    for u in built.usage:
        assert u.local_bytes == 0, f"{u.mangled} on sm_{u.arch}: {u.memory}"
        if not sass.name_of(u.mangled).startswith("attention"):
            assert u.registers <= 128, f"{u.mangled} on sm_{u.arch}: {u.registers} registers"
            assert sass.blocks_per_sm(u.arch, THREADS, u.registers) >= 2


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
    registers = {sass.name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
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
    registers = {sass.name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    for head_dim in (64, 80, 96):
        p = planner.plan_attention(kernel, "float16", 16, (64, 64), (64, 64), head_dim, 0, int(arch.rstrip("a")), 0.1)
        variant = "" if kernel == "backward_keys" else " 8 line"
        name = f"attention_{kernel.replace('forward', 'fwd').replace('backward', 'bwd')} float16 {head_dim}{variant}"
        blocks = sass.blocks_per_sm(arch, p.threads, registers[name], p.shared_bytes)
        assert blocks * p.threads >= 8 * 32, f"{blocks} blocks of {name}, {p.shared_bytes} bytes"


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("head_dim,arch", [(64, "80"), (64, "90a"), (80, "90a")])
def test_an_sm_has_room_for_two_windows_forward(built: Built, planner, head_dim: int, arch: str):
    registers = {sass.name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    window = (14, 14)
    p = planner.plan_attention("forward_window", "float16", 1, window, window, head_dim, 0, int(arch.rstrip("a")), 0.1)
    assert (p.refusal, p.threads, p.grid) == ("", 7 * 32, 1)
    assert (
        sass.blocks_per_sm(arch, p.threads, registers[f"attention_fwd_window float16 {head_dim} 2"], p.shared_bytes)
        >= 2
    )


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("head_dim,arch", [(64, "80"), (64, "90a"), (80, "90a")])
def test_an_sm_has_room_for_a_window(built: Built, planner, head_dim: int, arch: str):
    """D 80 takes more shared memory than sm_80 has: two kernels, there."""
    registers = {sass.name_of(u.mangled): u.registers for u in built.usage if u.arch == arch}
    window = (14, 14)
    p = planner.plan_attention("backward_window", "float16", 1, window, window, head_dim, 0, int(arch.rstrip("a")), 0.1)
    assert (p.refusal, p.threads) == ("", 7 * 32)
    name = f"attention_bwd_window float16 {head_dim}"
    assert sass.blocks_per_sm(arch, p.threads, registers[name], p.shared_bytes) >= 1


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


# ---- the rules and the parser, on code with planted faults

STREAM = """
		Function : _ZN6relpos17logits_fwd_kernelI6__halfS1_Lb0EEEvNS_15LogitsFwdParamsE
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
                                                                           /* 0x000fe40000000f00 */
        /*0010*/              @!P1 LDG.E.NA.128 R4, [R2.64] ;             /* 0x0000000402049981 */
        /*0020*/              @!P1 LDG.E.NA.128 R8, [R2.64+0x1000] ;      /* 0x0000000402049981 */
        /*0030*/              @!P1 LDG.E.NA.128 R12, [R2.64+0x2000] ;     /* 0x0000000402049981 */
        /*0040*/              @!P1 LDG.E.NA.128 R16, [R2.64+0x3000] ;     /* 0x0000000402049981 */
        /*0050*/               @P0 BRA 0xf0 ;                             /* 0x0000000000000947 */
        /*0060*/                   FADD R4, R4, R5 ;                      /* 0x0000000504047221 */
        /*0070*/                   STG.E.128 [R2.64], R4 ;                /* 0x0000000402007986 */
        /*0080*/                   STG.E.128 [R2.64+0x1000], R8 ;         /* 0x0000000402007986 */
        /*0090*/                   STG.E.128 [R2.64+0x2000], R12 ;        /* 0x0000000402007986 */
        /*00a0*/                   STG.E.128 [R2.64+0x3000], R16 ;        /* 0x0000000402007986 */
        /*00b0*/              @!P2 BRA 0x10 ;                             /* 0x0000000000000947 */
        /*00c0*/                   EXIT ;                                 /* 0x000000000000794d */
        /*00f0*/                   BRA 0x60 ;                             /* 0x0000000000007947 */
"""


def one(text: str) -> Kernel:
    (kernel,) = sass.parse(text)
    return kernel


def test_parser_and_control_flow():
    kernel = one(STREAM)
    assert (str(kernel), kernel.vector, len(kernel.code)) == ("logits_fwd float16 float16", 8, 14)
    loop = kernel.stream_loop
    assert loop is not None and (loop.head, *loop.ends) == (0x10, 0xB0)
    assert loop.body == {*range(0x10, 0xC0, 0x10), 0xF0}, "with the block behind the end"
    assert kernel.shortest_iteration(loop) == 11
    assert [fault for rule in RULES for fault in rule(kernel)] == []


@pytest.mark.parametrize(
    "line,planted,fault",
    [
        ("FADD R4, R4, R5", "STL [R1], R4", "local or generic memory: 1 of ['STL']"),
        ("FADD R4, R4, R5", "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4", "atomics: 1 of ['RED.E"),
        ("FADD R4, R4, R5", "LDG.E.U8 R4, [R2.64+0x1]", "by bytes: 1"),
        ("FADD R4, R4, R5", "HMMA.16816.F32 R4, R4, R8, R4", "1 HMMA"),
        ("LDG.E.NA.128 R16, [R2.64+0x3000]", "FADD R4, R4, R5", "3 reads and 4 writes"),
        ("STG.E.128 [R2.64], R4", "STG.E.64 [R2.64], R4", "4 reads and 3 writes"),
        ("MOV R1, c[0x0][0x28]", "HFMA2.MMA R1, -RZ, RZ, 0, 0", ""),  # no tensor core in spite of its name
        ("LDG.E.NA.128 R8, [R2.64+0x1000]", "PRMT R4, R4, 0x7632, R4", "used before all are on their way"),
        ("@!P2 BRA 0x10", "@!P2 BRA 0xc0", "no loop"),
    ],
)
def test_planted_faults_are_found(line: str, planted: str, fault: str):
    assert line in STREAM
    faults = [found for rule in RULES for found in rule(one(STREAM.replace(line, planted)))]
    assert any(fault in found for found in faults) if fault else not faults


WARPGROUP = """
		Function : _ZN6relpos25attention_fwd_sm90_kernelI6__halfLi64ELi8ELb1EEEvNS_21AttentionFwdSm90ParamsE
        /*0000*/                   LDGSTS.E.128 [R1], [R2.64] ;
        /*0010*/                   UTMALDG.5D [UR8], [UR4] ;
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0030*/                   LDSM.16.M88.4 R88, [R37] ;
        /*0040*/                   HGMMA.64x64x16.F32 R24, R88, gdesc[UR8], R24, gsb0 ;
        /*0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P0 BRA 0x80 ;
        /*0060*/                   FMUL R56, R56, R2 ;
        /*0080*/                   F2FP.F16.F32.PACK_AB R92, R25, R24 ;
        /*0090*/                   F2FP.F16.F32.PACK_AB R93, R27, R26 ;
        /*00a0*/                   F2FP.F16.F32.PACK_AB R94, R29, R28 ;
        /*00b0*/                   F2FP.F16.F32.PACK_AB R95, R31, R30 ;
        /*00c0*/                   HGMMA.64x64x16.F32 R56, R92, gdesc[UR8].tnspB, R56, gsb0 ;
        /*00c8*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00d0*/               @P1 BRA 0x30 ;
        /*00e0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "planted,fault",
    [
        ({}, ""),
        ({"@P1 BRA 0x30": "@P1 BRA 0x40"}, ""),  # kept through the loop, and not touched
        ({"@P1 BRA 0x30": "@P1 BRA 0x40", "FMUL R56, R56, R2": "FMUL R90, R56, R2"}, "at 0x40 may come from ['FMUL',"),
        ({"@P1 BRA 0x30": "@P1 BRA 0x40", "PACK_AB R93": "PACK_AB R91"}, "at 0x40 may come from ['F2FP"),
        ({"PACK_AB R93": "PACK_AB R97"}, "at 0xc0 may come from ['F2FP.F16.F32.PACK_AB', 'nothing']"),
        ({"LDSM.16.M88.4 R88": "@P2 LDSM.16.M88.4 R90"}, "at 0x40 may come from ['LDSM.16.M88.4', 'nothing']"),
        ({"UTMALDG.5D [UR8], [UR4]": "NOP"}, "0 UTMALDG"),
        ({"0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0": "0048*/ NOP"}, "PACK_AB at 0x80 does not wait for"),
        ({"0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0": "0048*/ MOV R91, R1"}, "MOV at 0x48 does not wait"),
        (
            {"0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0": "0048*/ WARPGROUP.DEPBAR.LE gsb0, 0x1"},
            "at 0x80 does",
        ),
        (
            {"00c8*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0": "00c8*/ FADD R2, R2, R57"},
            "FADD at 0xc8 does not",
        ),
    ],
)
def test_operands_of_warpgroups_are_followed(planted: dict[str, str], fault: str):
    text = WARPGROUP
    for original, slip in planted.items():
        assert original in text
        text = text.replace(original, slip)
    faults = [found for rule in RULES for found in rule(one(text))]
    assert any(fault in found for found in faults) if fault else not faults, faults


def test_ptxas_log_with_planted_faults():
    log = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function '_ZN6relpos16table_sum_kernelENS_15TableGradParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN6relpos16table_sum_kernelENS_15TableGradParamsE
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 129 registers, used 1 barriers, 600 bytes cmem[0]
"""
    (usage,) = sass.usage_of(log)
    assert (usage.arch, usage.registers, usage.local_bytes) == ("90a", 129, 16)
    assert sass.name_of(usage.mangled) == "table_sum"
    assert len(sass.complaints(log)) == 1


@pytest.mark.parametrize("registers,shared,blocks", [(128, 0, 2), (129, 0, 1), (64, 0, 4), (64, 100 * 1024, 1)])
def test_blocks_per_sm(registers: int, shared: int, blocks: int):
    assert sass.blocks_per_sm("80", THREADS, registers, shared) == blocks


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sass, "tool", lambda name: None)
    monkeypatch.setattr(sass, "no_nvcc", lambda: "")
    assert sass.missing() == "no cuobjdump and no nvdisasm"
    monkeypatch.setattr(sass, "no_nvcc", lambda: "no nvcc found")
    assert sass.missing() == "no nvcc found"
