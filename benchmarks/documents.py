"""The tables of README.md and docs/benchmarks.md, from committed results and nothing else.

    python -m benchmarks.documents      writes them anew

A table stands between two comments. The first says what it shows, and of which files:

    <!-- table: attention cpu/DATE-COMMIT.json -->
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path

from .report import OURS, PASSES, host_table, length_tables, plain, times_ours

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
TABLE = re.compile(r"(<!-- table: (\w+) (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# What ours is compared with, as the heading shows it; those that a file lacks are left out.
COLUMNS = {
    "logits": (
        *("ours, out of place", "eager", "eager, in place", "compiled"),
        *("bare `add_(1)`", "bare `add(1)`"),
    ),
    "attention": (
        "ours, mma.sync",
        *("sdpa, dense bias", "sdpa, dense bias, efficient", "sdpa, dense bias, cudnn", "eager"),
        *("eager, SAM", "eager, HF", "compiled", "flex", "concat", "concat, cudnn"),
        *("sdpa, no bias", "sdpa, no bias, flash", "sdpa, no bias, cudnn"),
    ),
}
KINDS = ("sdpa, dense bias", "eager", "sdpa, no bias")  # of peers of the attention, by how their names begin


def written(text: str) -> str:
    """A document with the tables that it asks for."""

    def fill(found: re.Match) -> str:
        begin, what, files, end = found.groups()
        results = (json.loads((RESULTS / file).read_text()) for file in files.split())
        return begin + markdown(TABLES[what](*results)) + end

    return TABLE.sub(fill, text)


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    heading, *others = rows
    lines = [f"| {' | '.join(row)} |\n" for row in (heading, *others)]
    return lines[0] + "|---" * len(heading) + "|\n" + "".join(lines[1:])


# ---- the tables


def op_table(op: str, result: dict) -> Iterable[tuple[str, ...]]:
    """Milliseconds of ours; of the others, their time as a multiple of ours. Medians of one interleaved run."""
    rows = [row for row in result["rows"] if row["op"] == op]
    there = {row["peer"] for row in rows}
    columns = [name for name in COLUMNS[op] if name.replace("`", "") in there]
    yield "layer", "dtype", "pass", OURS[op], *columns
    for layer, some in groupby(rows, lambda row: (row["shape"], row["dtype"])):
        of_layer = list(some)
        for direction in PASSES:
            peers = ({row["peer"]: row for row in of_layer if row["pass"] == direction}).get
            ours = peers(OURS[op])
            assert ours
            yield *layer, direction, *cells(ours, [peers(name.replace("`", "")) for name in columns])


def plain_calls(result: dict) -> Iterable[tuple[str, ...]]:
    """The attention without CUDA graphs."""
    return op_table("attention", {"rows": [plain(row) for row in result["rows"]]})


def summary(*results: dict) -> Iterable[tuple[str, ...]]:
    """The attention of several machines, both passes beside each other, of every kind of peer the fastest."""
    yield "", "layer", *(name for direction in PASSES for name in (direction, *KINDS))
    for result in results:
        rows = [row for row in result["rows"] if row["op"] == "attention" and not row.get("wrong")]
        for (shape, dtype), some in groupby(rows, lambda row: (row["shape"], row["dtype"])):
            of_layer = list(some)
            line: list[str] = []
            for direction in PASSES:
                of_pass = [row for row in of_layer if row["pass"] == direction]
                (ours,) = (row for row in of_pass if row["peer"] == OURS["attention"])
                kinds = [[row for row in of_pass if row["peer"].startswith(kind)] for kind in KINDS]
                fastest = [min(kind, key=partial(times_ours, ours=ours), default=None) for kind in kinds]
                line += cells(ours, fastest)
            yield machine(result["about"]), f"{shape}, {dtype}", *line


def cells(ours: dict, others: list[dict | None]) -> list[str]:
    def multiple(row: dict | None) -> str:
        if row is None:
            return ""
        return "wrong" if row.get("wrong") else f"{times_ours(row, ours):.1f} x"

    time = ours["milliseconds"]
    return [f"{time:.1f} ms" if time >= 5 else f"{time:.3f} ms", *map(multiple, others)]


def machine(about: dict) -> str:
    return f"{about['device']}, {about['isa']}" if "isa" in about else about["device"]


def encoders(result: dict) -> Iterable[tuple[str, ...]]:
    yield "encoder", "pass", "variant", "seconds", "speed-up", "peak memory"
    for row in (row for row in result["encoders"] if "milliseconds" in row):
        seconds, memory = f"{row['milliseconds'] / 1e3:.1f}", f"{row['peak_bytes'] / 2**20:.0f} MiB"
        what = f"{row['pass']}, {row['dtype']}"
        yield row["model"], what, row["variant"], seconds, f"{row['speed_up']:.2f} x", memory


def lengths(result: dict) -> Iterable[tuple[str, ...]]:
    for n, (direction, (heading, *rows)) in enumerate(length_tables(result["lengths"])):
        if n == 0:
            yield "pass", *heading
        yield from ((direction, *row) for row in rows)


def host(result: dict) -> Iterable[tuple[str, ...]]:
    for n, (op, rows) in enumerate(groupby(result["host"], lambda row: row["op"])):
        heading, *others = host_table(list(rows))
        if n == 0:
            yield "op", *heading
        yield from ((op, *row) for row in others)


TABLES = {
    "attention": lambda result: op_table("attention", result),
    "logits": lambda result: op_table("logits", result),
    "plain": plain_calls,
    "host": host,
    "summary": summary,
    "encoders": encoders,
    "lengths": lengths,
}


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(written(document.read_text()))


if __name__ == "__main__":
    main()
