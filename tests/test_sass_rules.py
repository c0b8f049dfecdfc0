"""The rules of sass_rules.py and the parser of sass.py, on machine code with planted faults."""

from __future__ import annotations

import pytest

import sass
from machine_code import Kernel, name_of, parse
from sass_rules import RULES

THREADS = 256

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
    (kernel,) = parse(text)
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
        /*0012*/                   LDG.E.128 R4, [R2.64] ;
        /*0014*/                   LDG.E.128 R8, [R2.64+0x40] ;
        /*0016*/              @!P0 LDG.E.128 R12, [R2.64+0x80] ;
        /*0018*/                   LDG.E.128 R16, [R2.64+0xc0] ;
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
        ({"LDG.E.128 R8": "LDG.E.64 R8"}, "table rows by 16 bytes: 3"),
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
    assert name_of(usage.mangled) == "table_sum"
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
