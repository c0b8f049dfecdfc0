"""Where bugs can be planted in the CUDA kernels, and a copy of them that holds every bug at once.

    __syncthreads();        a barrier, a wait, a copy  left out
    if (a && b < n)         each condition             taken as true, taken as false
    for (...; i < n; ...)   each bound                 one step further
    x[i]                    each index                 one element further; registers and axes are left out
    a + b                   a slip named in SLIPS

In the copy each is an expression of its own, `planted(7) ? slip : original`, so that one compilation serves all bugs:
the one whose number `relpos_planted_bug` holds is there, the others are not. `python tests/planting.py` lists them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT, KERNELS = Path(__file__).parent.parent, Path("csrc/cuda")
NOT_EMULATED = ("ptx.cuh",)  # instructions: benchmarks/probe.cu compares them
HEADER = """#pragma once
extern "C" {
inline int relpos_planted_bug = 0;
}
constexpr bool planted(int bug) { return !__builtin_is_constant_evaluated() && relpos_planted_bug == bug; }
"""

# Calls by themselves: what comes before is the end of another statement, or what this one depends on.
NAMES = r"\w*(?:sync|wait|fence|barrier|arrive|commit)\w*"
BARRIER = re.compile(rf"(?:^|[;{{}})]|\belse)\s*\b(?P<name>{NAMES})(?:<[^<>;]+>)?\(")

OPS = ("logits", "attention")  # what the .cu files begin with, and the tests
LEFT_OUT = "left out"

# (file below csrc/cuda, a whole operand of the real code, what a slip would make of it)
SLIPS = [
    ("tile/bias.cuh", "min(l, high)", "l"),
    ("tile/rows.cuh", "m - p.shape.prefix", "m"),
    ("tile/rows.cuh", "batch * p.q.batch", "group * p.q.batch"),
    ("tile/rows.cuh", "head * p.q.head", "0"),
    ("tile/rows.cuh", "s.axis[a].keys - 1", "0"),
    ("tile/rows.cuh", "c * axis.origin_step", "c"),
    ("tile/rows.cuh", "__funnelshift_r(down, down, of.k_shift)", "down >> of.k_shift"),
    ("tile/row_steps.cuh", "step % 2 * 4", "0"),
    ("tile/mma.cuh", "from_float<T>(x - to_float(high))", "from_float<T>(0.f)"),
    ("tile/mma.cuh", "x - two.x", "0.f"),
    ("tile/mma.cuh", "lane / 4 + e / 2 * 8", "lane / 4"),
    ("logits_fwd.cuh", "n -= p.shape.prefix", "n"),
    ("logits_fwd.cuh", "++j == keys_w", "++j > keys_w"),
    ("logits_fwd.cuh", "vectors * V + threadIdx.x", "elements"),
    ("tile/row_sums.cuh", "begin % V", "0"),
    ("table_grad.cuh", "begin + of_axis.per_split", "queries"),
    ("table_grad.cuh", "p.shape.prefix + (above * axis.queries + block.c) * inner + below", "below"),
    ("tile/long_sum.cuh", "x - (next - sum)", "0.f"),
    ("tile/split.cuh", "acc[e].missing", "0.f"),
]


@dataclass(frozen=True)
class Bug:
    file: str  # below csrc/cuda
    line: int
    original: str
    slip: str
    context: str  # the line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.original} -> {self.slip}"


@dataclass
class Place:
    """A span of a file, and the bugs that can be planted in it."""

    begin: int
    end: int
    slips: list[str] = field(default_factory=list)

    def choice(self, inside: str, first_bug: int) -> str:
        if self.slips == [LEFT_OUT]:
            return f"(planted({first_bug}) ? void() : static_cast<void>({inside}))"
        if "true" in self.slips:
            inside = f"static_cast<bool>({inside})"
        choices = (f"planted({n}) ? ({slip}) : " for n, slip in enumerate(self.slips, first_bug))
        return f"({''.join(choices)}({inside}))"


def bugs() -> list[Bug]:
    """All of them, in the order of their numbers, which begin at 1."""
    found = []
    for file, text in _kernel_files(ROOT):
        for place in _places(file, text):
            original, line = " ".join(text[place.begin : place.end].split()), text.count("\n", 0, place.begin) + 1
            context = text.splitlines()[line - 1].strip()
            found += [Bug(file, line, original, slip, context) for slip in place.slips]
    return found


def ops_of(file: str) -> list[str]:
    """Those whose kernels have this file below csrc/cuda in them; all, if no #include says so."""
    roots = {op: [p.name for p in sorted((ROOT / KERNELS).glob(f"{op}*.cu"))] for op in OPS}
    return [op for op, names in roots.items() if any(file in _included(name) for name in names)] or list(OPS)


@functools.cache
def _included(file: str) -> set[str]:
    """This file, what it includes, and so on."""
    path = ROOT / KERNELS / file
    names = re.findall(r'^#include "(.*\.cuh?)"', path.read_text(), re.M)
    inner = [os.path.relpath(path.parent / name, ROOT / KERNELS) for name in names]
    return {file}.union(*(_included(name) for name in inner))


def plant(root: Path) -> list[str]:
    """Plants every bug in a copy of csrc and tests/simt below `root`; flags for the compiler."""
    for part in ("csrc", "tests/simt"):
        shutil.copytree(ROOT / part, root / part)
    number = 0
    for file, text in _kernel_files(root):
        planted, number = _planted(text, _places(file, text), number)
        (root / KERNELS / file).write_text(planted)
    header = root / "planted.h"
    header.write_text(HEADER)
    return ["-include", str(header), "-g0"]  # half the time to compile; nobody reads the reports


def _kernel_files(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / KERNELS).rglob("*.cuh")):
        if path.name not in NOT_EMULATED:
            yield str(path.relative_to(root / KERNELS)), path.read_text()


def _planted(text: str, places: list[Place], number: int) -> tuple[str, int]:
    """The text with every place turned into a choice; and the last number used."""
    waiting = list(places)

    def render(begin: int, end: int) -> str:
        nonlocal number
        parts = []
        while waiting and waiting[0].begin < end:
            place = waiting.pop(0)
            assert place.end <= end, "two places overlap"
            first_bug, number = number + 1, number + len(place.slips)
            parts += [text[begin : place.begin], place.choice(render(place.begin, place.end), first_bug)]
            begin = place.end
        return "".join([*parts, text[begin:end]])

    return render(0, len(text)), number


# ---- finding places


def _places(file: str, text: str) -> list[Place]:
    """Sorted so that those around others come first."""
    code = _without_comments(text)
    found: dict[tuple[int, int], Place] = {}

    def add(begin: int, end: int, *slips: str) -> None:
        place = found.setdefault((begin, end), Place(begin, end))
        place.slips += [slip for slip in slips if slip not in place.slips]

    for match in BARRIER.finditer(code):
        end = _closing(code, match.end() - 1) + 1
        if code[end:].lstrip().startswith(";"):
            add(match.start("name"), end, LEFT_OUT)
    for begin, end in _conditions(code):
        for atom in _atoms(code, begin, end):
            if not _known_to_the_compiler(code[slice(*atom)]):
                add(*atom, *(value for value in ("true", "false") if value != code[slice(*atom)]))
    in_registers = set(re.findall(r"#pragma unroll[ \d]*\n *for \(int (\w+)", text))
    for begin, end in _bounds(code):
        for atom in _atoms(code, begin, end):
            if step := _one_further(code[slice(*atom)]):
                add(*atom, step)
    for begin, end in _indices(code):
        if code[begin:end] not in in_registers:
            add(begin, end, f"{text[begin:end]} + 1")
    for _, expression, slip in (s for s in SLIPS if s[0] == file):
        starts = [m.start() for m in re.finditer(re.escape(expression), code)]
        assert starts, f"{file} has no {expression!r} any more"
        for start in starts:
            add(start, start + len(expression), slip)
    return sorted(found.values(), key=lambda p: (p.begin, -p.end))


def _known_to_the_compiler(condition: str) -> bool:
    constants = r"k[A-Z]\w*|[A-Z][A-Z_\d]*|sizeof|true|false|\d+"
    return all(re.fullmatch(constants, word) for word in re.findall(r"\w+", condition))


def _without_comments(text: str) -> str:
    """Nor what the compiler decides. Of the same length, so that positions stay."""
    host = r"^constexpr \w+ \w+\(.*\{\n(?:  .*\n)*\}"
    return re.sub(rf"{host}|//.*|\".*?\"|#.*|template <.*", lambda m: re.sub(r"\S", " ", m[0]), text, flags=re.M)


def _closing(code: str, opening: int) -> int:
    """The bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError("a bracket is not closed")


def _split(code: str, begin: int, end: int, separator: str) -> list[tuple[int, int]]:
    """The parts of a span between separators that no bracket encloses."""
    parts, depth, start = [], 0, begin
    for i in range(begin, end):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0 and code.startswith(separator, i):
            parts.append((start, i))
            start = i + len(separator)
    return [*parts, (start, end)]


def _atoms(code: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The operands of && and || in a condition."""
    for separator in ("||", "&&"):
        parts = _split(code, begin, end, separator)
        if len(parts) > 1:
            for part in parts:
                yield from _atoms(code, *part)
            return
    while begin < end and code[begin].isspace():
        begin += 1
    while begin < end and code[end - 1].isspace():
        end -= 1
    if begin < end:
        yield begin, end


def _headers(code: str) -> Iterator[tuple[str, int, int]]:
    for match in re.finditer(r"\b(if|for|while) \(", code):
        yield match[1], match.end(), _closing(code, match.end() - 1)


def _conditions(code: str) -> Iterator[tuple[int, int]]:
    for keyword, begin, end in _headers(code):
        if keyword != "for":
            yield begin, end
    for match in re.finditer(r"\?", code):
        yield _operand_before(code, match.start()), match.start()
    for match in re.finditer(r"\bbool (?=\w+ = )", code):
        for begin, end in _split(code, match.end(), code.index(";", match.end()), ","):
            if name := re.match(r"\s*\w+ = ", code[begin:end]):
                yield begin + name.end(), end


def _bounds(code: str) -> Iterator[tuple[int, int]]:
    for keyword, begin, end in _headers(code):
        if keyword == "for":
            yield _split(code, begin, end, ";")[1]


def _operand_before(code: str, position: int) -> int:
    """Where the condition of the ?: operator at `position` begins."""
    depth = 0
    for i in range(position - 1, -1, -1):
        depth += (code[i] in ")]}") - (code[i] in "([{")
        is_assignment = code[i] == "=" and code[i - 1] not in "=<>!" and code[i + 1] != "="
        is_colon = code[i] == ":" and ":" not in (code[i - 1], code[i + 1])
        if depth < 0 or (depth == 0 and (code[i] in ",;?{}" or is_assignment or is_colon)):
            begin = i + 1
            while keyword := re.match(r"\s*(return\b|else\b|(if|for|while) (?=\())", code[begin:position]):
                begin += keyword.end()
                if keyword[2]:
                    begin = _closing(code, begin) + 1
            return begin + len(re.match(r"\s*", code[begin:])[0])
    raise ValueError("a condition has no beginning")


def _one_further(condition: str) -> str | None:
    """Of a bound that is no constant: those unroll over registers."""
    match = re.fullmatch(r"(.*[^<>-]) (<|<=) (.*)", condition, re.S)
    if not match or re.fullmatch(r"(Tile<T, D>::)?(k[A-Z]\S*|[A-Z]+|\d+)( / \d+)?", match[3]):
        return None
    return f"{match[1]} <= {match[3]}" if match[2] == "<" else f"{match[1]} <= {match[3]} + 1"


def _indices(code: str) -> Iterator[tuple[int, int]]:
    """Of accesses, not of declarations."""
    for match in re.finditer(r"(?<=[\w\])])\[", code):
        begin, end = match.end(), _closing(code, match.start())
        line = code[code.rfind("\n", 0, match.start()) + 1 : match.start()]
        is_declaration = re.search(r"\b(?:float|int|uint32_t|uint4|T|S) (?:\w+\[.*\], )*\(?&?\w+\)?(?:\[.*\])?$", line)
        is_axis = re.fullmatch(r"k[A-Z]\w*|(\w+\.)?a", code[begin:end])
        if re.search(r"[a-z]", code[begin:end]) and not is_declaration and not is_axis:
            yield begin, end


if __name__ == "__main__":
    for number, bug in enumerate(bugs(), 1):
        print(f"{number:4} {bug}")
