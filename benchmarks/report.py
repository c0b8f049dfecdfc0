"""The README's tables, made from committed results: ``python -m benchmarks.report OP RESULT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# op: ours, and what it is compared with; as the heading shows them
PEERS = {
    "logits": ("ours, in place", "eager", "eager, in place", "compiled", "bare `add_(1)`"),
    "attention": ("ours", "sdpa, dense bias", "eager", "sdpa, no bias"),
}


def table(op: str, result: Path) -> str:
    """Milliseconds of ours; of the others, their time as a multiple of ours. Medians of one interleaved run."""
    heading = ("layer", "dtype", "pass", *PEERS[op])
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    names = [name.replace("`", "") for name in PEERS[op]]
    for row in json.loads(result.read_text())["rows"]:
        if row["op"] != op:
            continue
        for direction in ("forward", "forward + backward"):
            ours, *others = (row["milliseconds"].get(f"{direction}: {name}") for name in names)
            cells = [f"{ours:.1f} ms", *(f"{time / ours:.1f} x" if time else "" for time in others)]
            lines.append(f"| {row['shape']} | {row['dtype']} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1], Path(sys.argv[2])))
