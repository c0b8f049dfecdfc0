"""SAM's image encoders from end to end: as transformers ships them, eager and sdpa, and with our kernels.

Random weights, filled tables; images per second, memory, and how far the results are from the stock ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from relpos_cuda import demo
from relpos_cuda._race import Steps, race

from .cases import DTYPES

VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
VIT_H["global_attn_indexes"] = [7, 15, 23, 31]
MODELS = {"SAM ViT-B": {}, "SAM ViT-H": VIT_H}
ROUNDS = {"cpu": 1, "cuda": 10}


def measured(device: str, dtypes: list[str], quick: bool, progress: Callable) -> list[dict]:
    if device == "cuda":
        plans = [(model, dtype, (1024, 1024)) for model in MODELS for dtype in dtypes if dtype != "float32"]
    else:
        plans = [("SAM ViT-B", dtypes[0], (256, 256) if quick else (1024, 512))]
    rows = []
    for model, dtype, sizes in plans:
        for (name, steps_of), size in zip(PASSES.items(), sizes, strict=True):
            progress(f"{model}, {name}, {size} pixels, {dtype}")
            stock = demo.build_model(size, device, DTYPES[dtype], **MODELS[model])
            pixels = torch.randn(1, 3, size, size).to(device, DTYPES[dtype])
            steps = steps_of(stock, demo.with_sdpa(stock, **MODELS[model]), pixels)
            about = {"model": f"{model}, {size} pixels", "pass": name, "dtype": dtype, "images": len(pixels)}
            rows += [about | row for row in rows_of(steps, device, 1 if quick else ROUNDS[device])]
    return rows


PASSES = {"inference": demo.inference_steps, "training step": demo.training_steps}


def rows_of(steps: Steps, device: str, rounds: int) -> list[dict]:
    results = race("encoder", steps, device, rounds)
    stock = results[demo.STOCK]
    return [
        {
            "variant": name,
            "milliseconds": float(f"{1e3 * runs.median:.4g}"),
            "spread": round(runs.spread, 3),
            "speed_up": round(stock.median / runs.median, 3),
            "peak_bytes": round(2**30 * max(runs.peaks)),
            "error": float(f"{runs.distance(stock)[1]:.2e}"),
        }
        for name, runs in results.items()
    ]
