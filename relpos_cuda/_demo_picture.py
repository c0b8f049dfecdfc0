"""The picture of the demo: photo, features of stock and of patched, their difference, time, memory."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

INK, FAINT, STOCK_BAR, OUR_BAR = "#1f2430", "#8a91a0", "#c3c9d5", "#3b6fd4"


def save(
    path: Path,
    photo: Tensor,  # [3, size, size], 0 to 255
    stock: Tensor,  # [C, h, w]
    patched: Tensor,  # [C, h, w]
    title: str,
    costs: dict[str, tuple[float, float]],  # variant -> seconds, GiB; the last one is ours
) -> None:
    """Features are shown in three principal components of ``stock``, the same ones for both."""
    from matplotlib.figure import Figure

    error = (patched - stock).norm(dim=0) / stock.norm(dim=0).mean()
    decade = -math.floor(math.log10(error.max().item())) if error.any() else 0
    amplified = f"10$^{{{decade}}}$ x difference" if error.any() else "difference: none at all"
    colours = principal_colours(stock)
    panels = [
        ("photograph", photo.permute(1, 2, 0) / 255),
        ("features, stock", colours(stock)),
        ("features, patched", colours(patched)),
        (amplified, error * 10.0**decade),
    ]

    figure = Figure(figsize=(16, 5.9), dpi=125, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.015, hspace=0.04)
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 0.19))
    for column, (name, image) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        smooth = "antialiased" if column == 0 else "bicubic"
        axes.imshow(image.numpy(), interpolation=smooth, cmap="magma", vmin=0, vmax=10)
        axes.set_title(name, color=INK, fontsize=13, loc="left")
        axes.set_axis_off()
    bars(figure.add_subplot(grid[1, :2]), "seconds per image", {n: c[0] for n, c in costs.items()})
    bars(figure.add_subplot(grid[1, 2:]), "peak memory, GiB", {n: c[1] for n, c in costs.items()})
    figure.suptitle(title, color=INK, fontsize=16, fontweight="bold", x=0.008, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def principal_colours(features: Tensor):
    """A map from features ``[C, h, w]`` to RGB ``[h, w, 3]``, fitted to these."""
    flat = features.flatten(1).T  # [h * w, C]
    mean = flat.mean(0)
    _, _, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    low, high = torch.quantile((flat - mean) @ axes[:3].T, torch.tensor([0.02, 0.98]), dim=0)

    def to_rgb(other: Tensor) -> Tensor:
        values = (other.permute(1, 2, 0) - mean) @ axes[:3].T
        return ((values - low) / (high - low)).clamp(0, 1)

    return to_rgb


def bars(axes, title: str, values: dict[str, float]) -> None:
    """One horizontal bar per variant, the value beside it."""
    for row, (name, value) in enumerate(values.items()):
        colour = OUR_BAR if row == len(values) - 1 else STOCK_BAR
        axes.barh(row, value, color=colour, height=0.68)
        axes.text(value, row, f"  {value:.3g}", va="center", color=INK, fontsize=11)
    axes.set_yticks(range(len(values)), list(values), color=INK, fontsize=11)
    axes.set_title(title, color=INK, fontsize=13, loc="left")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
