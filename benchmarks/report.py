"""The README's table, made from committed results: ``python -m benchmarks.report RESULT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEADER = [
    "| layer | dtype | pass | ours, in place | eager | eager, in place | compiled | bare `add_(1)` |",
    "|---|---|---|---|---|---|---|---|",
]


def table(result: Path) -> str:
    """Milliseconds of ours; of the others, their time as a multiple of ours. Medians of one interleaved run."""
    lines = list(HEADER)
    for row in json.loads(result.read_text())["rows"]:
        ms = row["milliseconds"]
        for direction in ("forward", "forward + backward"):
            ours = ms[f"{direction}: ours, in place"]
            names = ["eager", "eager, in place", "compiled", "bare add_(1)"]
            times = [ms.get(f"{direction}: {name}") for name in names]
            cells = [f"{ours:.1f} ms", *(f"{time / ours:.1f} x" if time else "" for time in times)]
            lines.append(f"| {row['shape']} | {row['dtype']} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def latest(folder: Path) -> Path:
    """The newest result of a machine: files are named by date."""
    return sorted(folder.glob("*.json"))[-1]


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
