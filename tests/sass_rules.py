"""What is wrong with the machine code of a kernel: rules, each of which tells faults in words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from machine_code import Kernel

UNROLL = 4  # vectors that a thread has in flight
ATOMICS = ("RED", "REDG", "REDAS", "ATOM", "ATOMG", "ATOMS", "UBLKRED", "UTMAREDG", "SUATOM", "SURED")
LOCAL = ("LDL", "STL", "LD", "ST")  # LD and ST: an address space the compiler could not tell


def faults_of_memory(k: Kernel) -> Iterator[str]:
    if found := k.roots(*LOCAL):
        yield f"local or generic memory: {len(found)} of {sorted(set(found))}"
    if found := k.roots(*ATOMICS):
        yield f"atomics: {len(found)} of {sorted(set(found))}"


def faults_of_widths(k: Kernel) -> Iterator[str]:
    if found := [opcode for opcode in k.roots("LDG", "STG") if ".U8" in opcode]:
        yield f"accesses to global memory by bytes: {len(found)}"
    of_rows = "LDGSTS" if str(k).endswith("whole") else "LDG"  # the former to shared memory
    rows = [i for i in k.code if re.fullmatch(rf"{of_rows}\..*\.128", i.opcode) and not i.streams_in]
    if k.finds_factors and len(rows) < 4:
        yield f"table rows by 16 bytes: {len(rows)}"


def faults_of_tensor_cores(k: Kernel) -> Iterator[str]:
    by_warps = k.finds_factors or (k.tensor_cores and "_sm90 " not in str(k))  # else by warpgroups alone
    for root, wanted in (("HMMA", by_warps), ("LDSM", k.loads_matrices)):
        if bool(k.roots(root)) != wanted:
            yield f"{len(k.roots(root))} {root}"
    for root in ("HGMMA", "UTMALDG"):
        if bool(k.roots(root)) != ("_sm90 " in str(k)):
            yield f"{len(k.roots(root))} {root}"
    if bool(k.roots("LDGSTS")) != k.copies_to_shared:
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
