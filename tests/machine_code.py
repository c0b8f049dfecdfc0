"""Machine code of the CUDA kernels, as cuobjdump prints it: instructions, control flow, loops.

    cuobjdump -sass ──parse──▶ kernels ──▶ control flow ──▶ the loop that streams the logits, that of the products

Branches are followed by address, so that blocks the compiler moved behind the end of a kernel count where they run.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str  # LDG.E.NA.128
    operands: str

    @property
    def root(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def streams_in(self) -> bool:
        """A read of 16 bytes that leaves L1 to others: load_stream of csrc/cuda/tile/ptx.cuh."""
        return bool(re.fullmatch(r"LDG\..*\bNA\b.*\.128", self.opcode))

    @property
    def stores_vector(self) -> bool:
        return self.root == "STG" and self.opcode.endswith(".128")

    @property
    def target(self) -> int | None:
        """Of a branch or call with a known target."""
        found = re.findall(r"0x[0-9a-f]+", self.operands) if self.root in ("BRA", "CALL") else []
        return int(found[-1], 16) if found else None

    @property
    def written(self) -> range:
        """Registers of the thread that an instruction other than HGMMA writes; as many as it can."""
        found = re.match(r"(?:U?P[T\d]+, )*R(\d+)\b", self.operands)
        if not found or self.root in ("STG", "STS", "R2UR", "SYNCS", "HGMMA"):
            return range(0)
        wide = 4 if re.search(r"\.128|LDSM.*\.4$", self.opcode) else 2 if re.search(r"64|WIDE|CS2R", self.opcode) else 1
        return range(int(found[1]), int(found[1]) + wide)

    @property
    def sums(self) -> range:
        """Registers of the thread that an HGMMA adds to."""
        found = re.match(r"R(\d+)", self.operands)
        columns = re.match(r"HGMMA\.64x(\d+)x16", self.opcode)
        return range(int(found[1]), int(found[1]) + int(columns[1]) // 2) if found and columns else range(0)

    @property
    def factors(self) -> range:
        """Those it multiplies, but for what is in shared memory."""
        found = re.match(r"R\d+, R(\d+), gdesc", self.operands if self.root == "HGMMA" else "")
        return range(int(found[1]), int(found[1]) + 4) if found else range(0)

    @property
    def ends_group(self) -> bool:
        return self.root == "HGMMA" and self.operands.endswith("gsb0")

    @property
    def groups_left(self) -> int | None:
        """Of products under way, after an instruction that waits."""
        found = re.match(r"gsb0, (0x[0-9a-f]+)", self.operands if self.opcode == "WARPGROUP.DEPBAR.LE" else "")
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        if self.root in ("EXIT", "RET", "BRX", "JMP"):
            return self.predicated
        return self.predicated or self.opcode != "BRA" or "," in self.operands  # BRA.DIV, BRA P1, ...


@dataclass(frozen=True)
class Loop:
    """The addresses that come round again to the first; those at the ends branch back."""

    head: int
    ends: frozenset[int]
    body: frozenset[int]


@dataclass(frozen=True)
class Kernel:
    mangled: str
    code: tuple[Instruction, ...]

    @property
    def attention(self) -> bool:
        return str(self).startswith("attention")

    @property
    def tensor_cores(self) -> bool:
        return self.attention or str(self).endswith(" mma")

    @property
    def loads_matrices(self) -> bool:
        """The logits op asks for q pair by pair."""
        return self.attention or self.tensor_cores and not str(self).startswith("logits_fwd")

    @property
    def copies_to_shared(self) -> bool:
        """From global memory, without registers between."""
        return self.attention or bool(re.match("(logits_bwd|table_partial) .* mma", str(self)))

    @property
    def finds_factors(self) -> bool:
        """On tensor cores."""
        return self.tensor_cores and not re.match("attention_bwd_keys|logits_bwd|table", str(self))

    @property
    def vector(self) -> int:
        """Logits of a 16-byte vector."""
        return 4 if name_of(self.mangled).split()[1] == "float32" else 8

    def __str__(self) -> str:
        return name_of(self.mangled)

    def roots(self, *names: str) -> list[str]:
        """Opcodes of the kernel that are one of these, whatever follows the first dot."""
        return [i.opcode for i in self.code if i.root in names]

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        following = dict(zip(self.code, self.code[1:], strict=False))
        known = {i.address for i in self.code}
        edges: dict[int, list[int]] = {}
        for i in self.code:
            edges[i.address] = [following[i].address] if i in following and i.falls_through else []
            if i.target in known:
                edges[i.address].append(i.target)
        return edges

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        edges = defaultdict(list)
        for address, targets in self.successors.items():
            for target in targets:
                edges[target].append(address)
        return edges

    @cached_property
    def loops(self) -> list[Loop]:
        found: dict[int, Loop] = {}
        for i in self.code:
            head = i.target
            if head is None or head > i.address or i.root != "BRA":
                continue
            if i.address in _distances(self.successors, self.code[0].address, without=head):
                continue  # not the end of a loop, but the way back from a block behind the end of the kernel
            known = found.get(head, Loop(head, frozenset(), frozenset()))
            body = known.body | {head, *_distances(self.predecessors, i.address, without=head)}
            found[head] = Loop(head, known.ends | {i.address}, body)
        return list(found.values())

    @cached_property
    def stream_loop(self) -> Loop | None:
        """The innermost loop that reads the logits; of several, the one with the most reads."""
        reads = {i.address for i in self.code if i.streams_in}
        loops = [loop for loop in self.loops if loop.body & reads]
        innermost = [loop for loop in loops if not any(other.body < loop.body for other in loops)]
        return max(innermost, key=lambda loop: sum(i.streams_in for i in self.within(loop)), default=None)

    def product_loop(self, products: int, root: str | None = None) -> Loop | None:
        """The smallest loop with at least so many products on tensor cores; by default that of the tiles of keys."""
        root = root or ("HGMMA" if self.roots("HGMMA") else "HMMA")
        large = [loop for loop in self.loops if sum(i.root == root for i in self.within(loop)) >= products]
        return min(large, key=lambda loop: len(loop.body), default=None)

    def written_before(self, address: int, register: int) -> set[str]:
        """Opcodes of all that may have written the register last when control comes to the address; or "nothing"."""
        at = {i.address: i for i in self.code}
        found: set[str] = set()
        seen: set[int] = set()
        pending = list(self.predecessors[address])
        while pending:
            i = at[pending.pop()]
            if i == self.code[0] and register not in i.written:
                found.add("nothing")
            if i.address in seen:
                continue
            seen.add(i.address)
            if register in i.written:
                found.add(i.opcode)
                if not i.predicated:
                    continue
            pending += self.predecessors[i.address]
        return found

    def meanwhile(self, product: Instruction) -> list[Instruction]:
        """What may run while a product of a warpgroup is under way: until a wait that leaves only groups after its."""
        at = {i.address: i for i in self.code}
        found: set[Instruction] = set()
        seen: set[tuple[int, int]] = set()
        pending = [(a, 0 if product.ends_group else -1) for a in self.successors[product.address]]
        while pending:  # an address, and how many groups have been committed after the product's; -1: not even that
            address, later = pending.pop()
            if (address, later) in seen or later > len(self.code):
                continue
            seen.add((address, later))
            i = at[address]
            found.add(i)
            if i.groups_left is not None and later >= i.groups_left:
                continue
            pending += [(a, later + i.ends_group) for a in self.successors[address]]
        return sorted(found, key=lambda i: i.address)

    def within(self, loop: Loop) -> list[Instruction]:
        return [i for i in self.code if i.address in loop.body]

    def shortest_iteration(self, loop: Loop) -> int | None:
        """Fewest instructions on a way round the loop that passes every 16-byte read and write of the logits."""
        inside = {a: [s for s in self.successors[a] if s in loop.body and s != loop.head] for a in loop.body}
        stops = [i.address for i in self.within(loop) if i.streams_in or i.stores_vector]
        total, at = 1, loop.head
        for goals in (*({stop} for stop in stops), loop.ends):
            steps, at = min(((n, goal) for goal, n in _distances(inside, at).items() if goal in goals), default=(0, -1))
            if at < 0:
                return None
            total += steps
        return total


def _distances(edges: dict[int, list[int]], start: int, without: int | None = None) -> dict[int, int]:
    """Steps from ``start`` to all that can be reached, never through ``without``."""
    if start == without:
        return {}
    found, pending = {start: 0}, [start]
    for address in pending:  # grows: breadth first
        for target in edges[address]:
            if target != without and target not in found:
                found[target] = found[address] + 1
                pending.append(target)
    return found


_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def name_of(mangled: str) -> str:
    """Of a kernel of namespace relpos: name, types, numbers, mma for tensor cores: logits_fwd float32 float16 mma.

    Of attention, head dimension, blocks of keys, line for one line per tile: attention_fwd float16 64 8 line; of
    windows, whole where all of the table is in shared memory.
    """
    found = re.match(r"_ZN6relpos\d+(\w+?)_kernel(?:I(.*?)(?:Lb(\d)E)?E)?E", mangled)
    if not found:
        raise ValueError(f"not a kernel of this project: {mangled}")
    words = [found[1]]
    for token in re.findall(r"f|6__half|13__nv_bfloat16|S\d*_|Li\d+", found[2] or ""):
        again = token.startswith("S")  # S1_: the same type again
        words.append(words[-1] if again else _TYPES.get(token, token.removeprefix("Li")))
    flag = "whole" if found[1].endswith("window") else "line" if found[1].startswith("attention") else "mma"
    return " ".join((*words, flag) if found[3] == "1" else words)


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*(.*?)\s*;")


def parse(text: str) -> list[Kernel]:
    """Kernels in the output of `cuobjdump -sass`."""
    kernels: list[Kernel] = []
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        mangled, *lines = part.splitlines()
        code = tuple(
            Instruction(int(m[1], 16), bool(m[2]), m[3], m[4]) for line in lines if (m := _INSTRUCTION.match(line))
        )
        kernels.append(Kernel(mangled.strip(), code))
    return kernels
