"""The picture of the demo: photo, features of stock and of accelerated, difference, time, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INK, FAINT, STOCK_BAR, OUR_BAR = "#1f2430", "#6c7383", "#c3c9d5", "#3b6fd4"


def save(
    path: Path,
    photo: Tensor,  # [3, size, size], 0 to 255
    stock: Tensor,  # [C, h, w]
    accelerated: Tensor,  # [C, h, w]
    title: str,
    setting: str,
    costs: dict[str, tuple[float, float]],  # variant -> seconds, GiB; the last one is ours
) -> None:
    """Features are shown in three principal components of ``stock``, the same ones for both."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    colours = principal_colours(stock)
    error = ((accelerated - stock).norm(dim=0) / stock.norm(dim=0).mean()).nan_to_num()
    factor = round_number_below(1 / error.max().item()) if error.any() else 1.0
    panels = [
        ("photograph", photo.permute(1, 2, 0) / 255),
        ("features, stock", colours(stock)),
        ("features, accelerated", colours(accelerated)),
        (f"difference x {factor:,.9g}" if error.any() else "difference: none, bit for bit", error * factor),
    ]

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.04, wspace=0.02)
    figure: Any = Figure(figsize=(16, 6.3), dpi=125, layout=layout, facecolor="white")
    header, pictures, charts = figure.subfigures(3, 1, height_ratios=(0.74, 4.15, 1.2))
    header.text(0.006, 0.7, title, color=INK, fontsize=18, fontweight="bold", va="center")
    header.text(0.006, 0.28, setting, color=FAINT, fontsize=12.5, va="center")
    for axes, (name, image) in zip(pictures.subplots(1, 4), panels, strict=True):
        smooth = "antialiased" if name == "photograph" else "bicubic"
        axes.imshow(image.numpy(), interpolation=smooth, cmap="magma", vmin=0, vmax=1)
        axes.set_title(name, color=INK, fontsize=13.5, loc="left")
        axes.set_axis_off()
    left, right = charts.subplots(1, 2)
    bars(left, "seconds per image", {name: seconds for name, (seconds, _) in costs.items()})
    bars(right, "peak memory above the weights, GiB", {name: gib for name, (_, gib) in costs.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def principal_colours(features: Tensor) -> Callable[[Tensor], Tensor]:
    """A map from features ``[C, h, w]`` to RGB ``[h, w, 3]``, fitted to these."""
    flat = features.flatten(1).T  # [h * w, C]
    mean = flat.mean(0)
    axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T  # [C, 3]
    low, high = torch.quantile((flat - mean) @ axes, torch.tensor([0.02, 0.98]), dim=0)

    def to_rgb(other: Tensor) -> Tensor:
        return (((other.permute(1, 2, 0) - mean) @ axes - low) / (high - low)).clamp(0, 1)

    return to_rgb


def round_number_below(value: float) -> float:
    """The largest of ... 0.5, 1, 2, 5, 10 ... that is not above ``value``."""
    decade = 10.0 ** math.floor(math.log10(value))
    return max(digit * decade for digit in (1, 2, 5) if digit * decade <= value or digit == 1)


def bars(axes: Any, title: str, values: dict[str, float]) -> None:
    """One horizontal bar per variant, the value beside it."""
    known = [0.0 if math.isnan(value) else value for value in values.values()]
    colours = [STOCK_BAR] * (len(known) - 1) + [OUR_BAR]
    drawn = axes.barh(list(values), known, color=colours, height=0.7)
    labels = [f"{value:.3g}" for value in values.values()]
    axes.bar_label(drawn, labels, padding=6, color=INK, fontsize=11.5)
    axes.set_title(title, color=INK, fontsize=13.5, loc="left")
    axes.set_xlim(0, 1.12 * max(known) or 1.0)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=11.5, labelcolor=INK)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
