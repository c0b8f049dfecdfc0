"""Plots of a result file, and of nothing else: ``python -m benchmarks.plots RESULT.json FOLDER``.

    time.svg, memory.svg    a layer against the length of its sequence
    peers.svg               every peer's time as a multiple of ours
    roofline.svg            arithmetic per byte and per second, under the rates of the machine

Each names the file and the machine, and has the digest of the file in it, by which tests know that the two belong
together.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import OURS, PASSES, times_ours

STYLE = {
    "svg.hashsalt": "relpos_cuda",  # the same file every time
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
COLORS = {  # by how the name of a peer begins
    "ours": "#d1495b",
    "eager, SAM": "#8d99ae",
    "eager, HF": "#b8c0d0",
    "eager": "#8d99ae",
    "compiled": "#6a4c93",
    "sdpa, dense bias": "#00798c",
    "flex": "#edae49",
    "concat": "#66a182",
    "sdpa, no bias": "#2e4057",
    "bare": "#2e4057",
}
OTHER = "#b0a8b9"


def color_of(peer: str) -> str:
    return next((color for name, color in COLORS.items() if peer.startswith(name)), OTHER)


def draw(file: Path, folder: Path) -> list[Path]:
    """Those plots that the file has rows for."""
    result = json.loads(file.read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with pyplot.rc_context(STYLE):
        for name, (plot, key) in PLOTS.items():
            if result[key]:
                figure = plot(result)
                figure.text(0.01, 0.005, _source(result, file), fontsize=7, color="0.4")
                path = folder / f"{name}.svg"
                metadata = {"Date": None, "Description": f"drawn from {file.name}, sha256 {digest}"}
                figure.savefig(path, metadata=metadata)
                pyplot.close(figure)
                written.append(path)
    return written


def _source(result: dict, file: Path) -> str:
    about = result["about"]
    threads = f", {about['threads']} threads" if "threads" in about else ""
    return f"{file.name}: {about['device']}{threads}, PyTorch {about['versions']['torch']}, {about['date']}"


def _side_by_side(count: int, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure, axes = pyplot.subplots(1, count, figsize=(10, height), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    return figure, list(axes[0])


# ---- against the length


def over_length(result: dict, quantity: str, unit: str, value: Callable[[dict], float]) -> Figure:
    figure, axes = _side_by_side(2)
    for axis, direction in zip(axes, PASSES, strict=True):
        rows = [row for row in result["lengths"] if row.get("pass") == direction]
        for peer in dict.fromkeys(row["peer"] for row in rows):
            of_peer = [row for row in rows if row["peer"] == peer]
            done = [row for row in of_peer if "outcome" not in row]
            x, y = [row["side"] ** 2 for row in done], [value(row) for row in done]
            axis.plot(x, y, "o-", color=color_of(peer), label=peer, zorder=3 if peer == "ours" else 2)
            failed = [row for row in of_peer if row.get("outcome") == "out of memory"]
            if failed and done:
                axis.plot(x[-1], y[-1], "x", color=color_of(peer), markersize=14, markeredgewidth=2)
                axis.text(0.98, 0.03 + 0.07 * len(axis.texts), f"{peer}: out of memory at {failed[0]['side']}²",
                          transform=axis.transAxes, ha="right", fontsize=8, color=color_of(peer))  # fmt: skip
        axis.set(xscale="log", yscale="log", title=direction, xlabel="tokens", ylabel=f"{quantity}, {unit}")
        sides = sorted({row["side"] for row in rows})
        axis.set_xticks([n * n for n in sides], [f"{n}²" for n in sides], minor=False)
        axis.set_xticks([], minor=True)
    axes[0].legend()
    dtype = result["lengths"][0]["dtype"]
    figure.suptitle(f"{quantity.capitalize()} of one attention layer with relative positions (12 heads, D 64, {dtype})")
    return figure


def time_over_length(result: dict) -> Figure:
    return over_length(result, "time", "ms", lambda row: row["milliseconds"])


def memory_over_length(result: dict) -> Figure:
    def mebibytes(row: dict) -> float:  # what is measured as nothing is shown at the lower end
        return math.nan if row["peak_bytes"] is None else max(row["peak_bytes"] / 2**20, 1 / 64)

    return over_length(result, "memory", "MiB beside inputs", mebibytes)


# ---- peers


def peers(result: dict) -> Figure:
    rows = [row for row in result["rows"] if row["op"] == "attention" and row["pass"] in PASSES]
    layers = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = _side_by_side(2, height=1.2 + 0.16 * len(layers) * len(names))
    for axis, direction in zip(axes, PASSES, strict=True):
        found = {(r["shape"], r["dtype"], r["peer"]): r for r in rows if r["pass"] == direction}
        ticks = []
        for n, layer in enumerate(layers):
            ours = found.get((*layer, OURS["attention"]))
            for i, name in enumerate(names):
                y = n * (len(names) + 1.5) + i
                if (row := found.get((*layer, name))) and ours:
                    multiple = times_ours(row, ours)
                    axis.barh(y, multiple, color=color_of(name), height=0.9)
                    axis.text(multiple, y, f" {multiple:.2g}", va="center", fontsize=7)
            ticks.append(n * (len(names) + 1.5) + (len(names) - 1) / 2)
        axis.axvline(1, color=COLORS["ours"], linewidth=1)
        axis.set(title=direction, xlabel="time as a multiple of ours")
        axis.set_yticks(
            ticks, [f"{shape.split(':')[0]}\n{dtype}" for shape, dtype in layers] if axis is axes[0] else []
        )
        axis.grid(False, axis="y")
        axis.invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color_of(name)) for name in names]
    figure.legend(handles, names, loc="outside lower right", ncols=4, fontsize=8)  # left of it: the source
    figure.suptitle("The attention op against every other way to compute it")
    return figure


# ---- roofline


def roofline(result: dict) -> Figure:
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    figure, axes = _side_by_side(len(dtypes))
    for axis, dtype in zip(axes, dtypes, strict=True):
        gflops, gbytes = (max(rates[key] for rates in _rates(result, dtype)) for key in ("gflops", "gbytes"))
        rows = [row for row in result["rows"] if row["dtype"] == dtype and "note" not in row and row["pass"] in PASSES]
        intensities = [row["work"]["flops"] / row["work"]["bytes"] for row in rows]
        x = [min(intensities) / 2, gflops / gbytes, max(*intensities, gflops / gbytes) * 2]
        axis.plot(x, [min(gflops, i * gbytes) for i in x], color="0.3", linewidth=1.5)
        axis.text(x[1], gflops, f"{gflops:.0f} GFLOP/s", va="bottom", fontsize=8)
        axis.text(x[0], x[0] * gbytes * 1.3, f"{gbytes:.0f} GB/s", fontsize=8)
        for row, intensity in zip(rows, intensities, strict=True):
            ours = row["peer"] == OURS[row["op"]]
            marker = "o" if row["op"] == "attention" else "s"
            rate = row["work"]["flops"] / row["milliseconds"] / 1e6
            axis.plot(intensity, rate, marker, color=color_of(row["peer"]), alpha=1 if ours else 0.5,
                      markersize=8 if ours else 5, zorder=3 if ours else 2)  # fmt: skip
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    names = dict.fromkeys(row["peer"] for row in result["rows"] if "note" not in row)
    shortest = {color_of(name): name for name in sorted(names, key=len, reverse=True)}
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=color) for color in shortest]
    figure.legend(handles, shortest.values(), loc="outside lower right", ncols=4, fontsize=8)
    figure.suptitle("Attention op (dots) and logits op (squares) under the measured roofs")
    return figure


def _rates(result: dict, dtype: str) -> list[dict]:
    return [{"gflops": rates["gflops"][dtype], "gbytes": rates["gbytes"]} for rates in result["rates"]]


PLOTS = {  # name: function, and the rows it needs
    "time": (time_over_length, "lengths"),
    "memory": (memory_over_length, "lengths"),
    "peers": (peers, "rows"),
    "roofline": (roofline, "rows"),
}


if __name__ == "__main__":
    for written in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(written)
