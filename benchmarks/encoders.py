"""Image encoders from end to end: as their libraries ship them, and accelerated; inference, and a step of training.

    SAM ViT-B, ViT-H      transformers, eager and sdpa
    ViTDet-B              transformers, eager; on a GPU
    MViTv2-S              torchvision, a clip of 16 frames; on a GPU

Random weights, filled tables. Images per second, memory, and how far the results are from the stock ones. A library
that is not installed is named with that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from relpos_cuda import demo
from relpos_cuda._race import Steps, bytes_of, race
from relpos_cuda.integrations.accelerate import accelerate, restore

from .cases import DTYPES

STOCK, SDPA, OURS = demo.STOCK, demo.SDPA, demo.OURS
ROUNDS = {"cpu": 1, "cuda": 10}
VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
VIT_H["global_attn_indexes"] = [7, 15, 23, 31]
Variants = dict[str, nn.Module]  # the last is the one that is accelerated


# ---- models


def sam(size: int, device: str, dtype: torch.dtype, **config: object) -> tuple[Variants, Tensor]:
    stock = demo.build_model(size, device, dtype, **config)
    return {STOCK: stock, SDPA: demo.with_sdpa(stock, **config)}, torch.randn(1, 3, size, size)


def sam_h(size: int, device: str, dtype: torch.dtype) -> tuple[Variants, Tensor]:
    return sam(size, device, dtype, **VIT_H)


def vitdet(size: int, device: str, dtype: torch.dtype) -> tuple[Variants, Tensor]:
    from transformers import VitDetConfig, VitDetModel

    windows = [n for n in range(12) if n not in (2, 5, 8, 11)]
    positions = {"window_block_indices": windows, "window_size": 14, "use_relative_position_embeddings": True}
    model = VitDetModel(VitDetConfig(image_size=size, **positions)).to(device, dtype)
    return {STOCK: with_tables(model)}, torch.randn(1, 3, size, size)


def mvit(size: int, device: str, dtype: torch.dtype) -> tuple[Variants, Tensor]:
    from torchvision.models.video import mvit_v2_s

    return {STOCK: with_tables(mvit_v2_s()).to(device, dtype)}, torch.randn(1, 3, 16, size, size)


def with_tables(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rel_pos" in name:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


MODELS = {"SAM ViT-B": sam, "SAM ViT-H": sam_h, "ViTDet-B": vitdet, "MViTv2-S": mvit}
SIZES = {"MViTv2-S": 224}  # all others: 1024


# ---- passes


def infer(model: nn.Module, pixels: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return features(model(pixels))


def train(model: nn.Module, pixels: Tensor) -> Tensor:
    model.eval()  # stochastic depth would be the only difference
    out = features(model(pixels))
    out.float().square().mean().backward()
    model.zero_grad()
    return out.detach()


def features(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else out.last_hidden_state  # type: ignore[attr-defined]


PASSES = {"inference": infer, "training step": train}


# ---- rows


def measured(device: str, dtypes: list[str], quick: bool, progress: Callable, rounds: int | None = None) -> list[dict]:
    plans = [(model, dtype, SIZES.get(model, 1024)) for model in MODELS for dtype in dtypes if dtype != "float32"]
    rows = []
    for name, run in PASSES.items():
        if device == "cpu":  # float32, and training on a quarter of the image
            plans = [("SAM ViT-B", dtypes[0], 256 if quick else 1024 if name == "inference" else 512)]
        for model, dtype, size in plans:
            progress(f"{model}, {name}, {size} pixels, {dtype}")
            about = {"model": f"{model}, {size} pixels", "pass": name, "dtype": dtype}
            try:
                variants, pixels = MODELS[model](size, device, DTYPES[dtype])
                steps = steps_of(variants, run, pixels.to(device, DTYPES[dtype]))
                rows += [about | row for row in rows_of(steps, device, rounds or (1 if quick else ROUNDS[device]))]
            except (ImportError, torch.OutOfMemoryError) as error:
                rows.append(about | {"variant": str(error).split("\n")[0]})
    return rows


def steps_of(variants: Variants, run: Callable[[nn.Module, Tensor], Tensor], pixels: Tensor) -> Steps:
    *_, last = variants.values()

    def accelerated() -> Tensor:
        accelerate(last)
        try:
            return run(last, pixels)
        finally:
            restore(last)

    steps: Steps = {name: lambda model=model: run(model, pixels) for name, model in variants.items()}
    return steps | {OURS: accelerated}


def rows_of(steps: Steps, device: str, rounds: int) -> list[dict]:
    results = race("encoder", steps, device, rounds)
    stock = results[STOCK]
    return [
        {
            "variant": name,
            "milliseconds": float(f"{1e3 * runs.median:.4g}"),
            "samples": len(runs.seconds),
            "spread": round(runs.spread, 3),
            "speed_up": round(stock.median / runs.median, 3),
            "peak_bytes": bytes_of(max(runs.peaks)),
            "error": float(f"{runs.distance(stock)[1]:.2e}"),
        }
        for name, runs in results.items()
    ]
