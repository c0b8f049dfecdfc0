"""Results on the terminal, as tables, while they come."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from .floors import floor_milliseconds

OURS = {"attention": "ours", "logits": "ours, in place"}
PASSES = ("forward", "forward + backward")  # that documents and plots show
Table = list[tuple[str, ...]]


def heading(result: dict) -> str:
    about = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    more = ", ".join(str(about[key]) for key in ("driver", "isa") if key in about)
    threads = f", {about['threads']} threads" if "threads" in about else ""
    return f"{about['device']}, {more}{threads}; {versions}; commit {about['commit']}\n{rates_line(result)}"


def rates_line(result: dict) -> str:
    when = ("before", "after")
    return "\n".join(f"{word}: {_rates(rates)}" for word, rates in zip(when, result["rates"], strict=False))


def _rates(rates: dict) -> str:
    products = ", ".join(f"{name} {gflops:.0f} GFLOP/s" for name, gflops in rates["gflops"].items())
    clock = f", SM clock {rates['sm_clock']}" if "sm_clock" in rates else ""
    return f"memory {rates['gbytes']:.0f} GB/s, products {products}{clock}"


def times_ours(row: dict, ours: dict) -> float:
    """The time of a row as a multiple of ours: plain calls of both, where one of them cannot be captured."""
    if ("plain" in row) == ("plain" in ours):
        return row["milliseconds"] / ours["milliseconds"]
    return plain(row)["milliseconds"] / plain(ours)["milliseconds"]


def plain(row: dict) -> dict:
    """The row with the time of plain calls, as all of a CPU are."""
    return {key: value for key, value in (row | row.get("plain", {})).items() if key != "plain"}


def text_of(part: dict, result: dict) -> str:
    """What a part has found, as tables."""
    tables = [_ops(part.get("rows", []), result["rates"][0]), _lengths(part.get("lengths", []))]
    tables += [_encoders(part.get("encoders", [])), _host(part.get("host", []))]
    lines = [line for table in tables for line in table]
    lines += [f"  {row['peer']}: {row['reason']}" for row in part.get("refused", [])]
    return "\n".join(lines) + "\n"


def _ops(rows: list[dict], rates: dict) -> Iterable[str]:
    for key, some in groupby(rows, lambda row: (row["op"], row["shape"], row["dtype"])):
        yield ", ".join(key)
        table = [("pass", "peer", "ms", "quartiles", "x ours", "of floor", "peak MiB", "error", "bits", "plain ms")]
        of_peers = sorted(some, key=lambda row: row["pass"] != "forward")
        ours = {row["pass"]: row for row in of_peers if row["peer"] == OURS[key[0]]}
        table += [_cells(row, ours.get(row["pass"]), floor_of(row, rates)) for row in of_peers]
        yield from aligned(table)


def _cells(row: dict, ours: dict | None, floor: float) -> tuple[str, ...]:
    low, high = row["quartiles"]
    error = "" if "errors" not in row else f"{max(row['errors'].values()):.0e}" + (" WRONG" if row["wrong"] else "")
    return (
        row["pass"],
        row["peer"],
        four_digits(row["milliseconds"]),
        f"{four_digits(low)} .. {four_digits(high)}",
        f"{times_ours(row, ours):.2f} x" if ours else "",
        f"{floor / row['milliseconds']:.0%}",
        mebibytes(row["peak_bytes"]),
        "less work" if "note" in row else error,
        {None: "", True: "same", False: "vary"}[row["deterministic"]],
        four_digits(row["plain"]["milliseconds"]) if "plain" in row else "",
    )


def four_digits(milliseconds: float) -> str:
    return f"{milliseconds:.4g}" if milliseconds < 9999.5 else f"{milliseconds:.0f}"


def three_digits(microseconds: float) -> str:
    return f"{microseconds:.3g}" if microseconds < 999.5 else f"{microseconds:.0f}"


def mebibytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.0f}"


def floor_of(row: dict, rates: dict) -> float:
    return floor_milliseconds(**row["work"], gflops=rates["gflops"][row["dtype"]], gbytes=rates["gbytes"])


def _lengths(rows: list[dict]) -> Iterable[str]:
    for direction, table in length_tables(rows):
        yield f"a layer against its length, {direction}, {rows[0]['dtype']}"
        yield from aligned(table)
    yield from (f"  {row['peer']}: {row['outcome']}" for row in rows if "side" not in row)


def length_tables(rows: list[dict]) -> Iterable[tuple[str, Table]]:
    """A table of each pass, tokens downwards, peers to the right."""

    def cell(row: dict) -> str:
        if "outcome" in row:
            return row["outcome"]
        return f"{four_digits(row['milliseconds'])} ms, {mebibytes(row['peak_bytes'])} MiB"

    sides = sorted({row["side"] for row in rows if "side" in row})
    peers = list(dict.fromkeys(row["peer"] for row in rows if "side" in row))
    found = {(row["pass"], row["peer"], row["side"]): cell(row) for row in rows if "side" in row}
    for direction in dict.fromkeys(key[0] for key in found):
        heading = ("tokens", *peers)
        yield direction, [heading, *((f"{n} x {n}", *(found.get((direction, p, n), "") for p in peers)) for n in sides)]


def _encoders(rows: list[dict]) -> Iterable[str]:
    for key, some in groupby(rows, lambda row: (row["model"], row["pass"], row["dtype"])):
        yield ", ".join(key)
        table = [("", "images/s", "ms", "spread", "speed-up", "peak MiB", "rel. L2")]
        for row in some:
            if "milliseconds" not in row:  # why it was not run
                table.append((row["variant"], *[""] * 6))
                continue
            table.append(
                (
                    row["variant"],
                    f"{1e3 / row['milliseconds']:.3g}",
                    four_digits(row["milliseconds"]),
                    f"{row['spread']:.0%}",
                    f"{row['speed_up']:.2f} x",
                    mebibytes(row["peak_bytes"]),
                    f"{row['error']:.0e}",
                )
            )
        yield from aligned(table)


def _host(rows: list[dict]) -> Iterable[str]:
    for op, some in groupby(rows, lambda row: row["op"]):
        yield f"{op}, microseconds of the host per call"
        yield from aligned(host_table(list(some)))


def host_table(rows: list[dict]) -> Table:
    """Passes to the right, peers downwards."""
    found = {(row["peer"], row["pass"]): three_digits(row["microseconds"]) for row in rows}
    peers, passes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("peer", "pass"))
    return [("peer", *passes), *((p, *(found.get((p, q), "") for q in passes)) for p in peers)]


def aligned(table: Table) -> Iterable[str]:
    """The first two columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = 2 if table[0][0] == "pass" else 1
    for row in table:
        cells = (c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  " + "  ".join(cells).rstrip()
