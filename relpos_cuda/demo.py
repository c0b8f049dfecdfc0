"""SAM's image encoder on a photograph, as transformers ships it and accelerated: time, memory, picture.

The weights are random (tables filled, which a fresh SAM has at zero), the photograph is in the
scikit-image wheel: nothing is downloaded. All variants share their weights and take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._race import Steps, measure, race, table
from .functional import add_decomposed_rel_pos
from .integrations.accelerate import accelerate, restore

PATCH = 16  # pixels per side of a token
SIZES = (1024, 768, 512, 256)  # image sides; the first is SAM's own
PATIENCE = 180.0  # seconds a run may take on a CPU where the size is ours to choose
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of SAM's image processor
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STOCK, SDPA, OURS = "stock, eager", "stock, sdpa", "accelerated"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        0: stock and accelerated agree; 1: they do not; 2: a package, a GPU or memory is missing.
    """
    args = _parser().parse_args(argv)
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
        import tqdm  # noqa: F401
        import transformers
    except ImportError as error:
        return _complain(f"{error.name} is missing: pip install 'relpos_cuda[demo]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _complain("--device cuda, but torch finds no GPU")
    transformers.logging.set_verbosity_error()
    try:
        return _run(args)
    except torch.OutOfMemoryError as error:
        return _complain(f"try a smaller --size: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "SAM's image encoder on a photograph, stock and accelerated: time, memory, picture."
    parser = argparse.ArgumentParser(prog="python -m relpos_cuda demo", description=about)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", type=_side, help="image side (1024, or less on a slow CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here, help=f"({here})")
    parser.add_argument("--dtype", choices=DTYPES, help="(float32; bfloat16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each variant (3)")
    parser.add_argument("--train", action="store_true", help="time forward + backward as well")
    parser.add_argument("--quick", action="store_true", help="256 pixels, one round")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture (demo.png)")
    return parser


def _side(text: str) -> int:
    if int(text) < PATCH or int(text) % PATCH:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of {PATCH}, got {text}")
    return int(text)


def _complain(message: str) -> int:
    print(f"relpos_cuda demo: {message}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    from . import _demo_picture

    dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    rounds = 1 if args.quick else max(1, args.rounds)
    size = args.size or (SIZES[-1] if args.quick else SIZES[0])
    model = build_model(size, args.device, dtype)
    if args.device == "cpu" and not (args.size or args.quick):
        passes = 3 * (rounds + 1) * (4 if args.train else 1)  # a backward costs two forwards
        if (affordable := affordable_size(model, passes)) < size:
            size, model = affordable, build_model(affordable, args.device, dtype)
    photo = load_photo(size)
    pixels = normalized(photo).to(args.device, dtype)
    sdpa = with_sdpa(model)

    machine = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    runs = f"median of {rounds} runs" if rounds > 1 else "one run"
    shapes = f"[1, 3, {size}, {size}] to [1, 256, {size // PATCH}, {size // PATCH}]"
    setting = f"{shapes}, {str(dtype).removeprefix('torch.')}, {machine}, {runs}"
    print(f"SAM ViT-B image encoder, {setting}\n")
    inference = race("inference", inference_steps(model, sdpa, pixels), args.device, rounds)
    print(table("image", inference))
    if args.train:
        steps = training_steps(model, sdpa, pixels)
        print(table("image, forward + backward", race("training", steps, args.device, rounds)))
    logits = race("logits", logits_steps(model, pixels), args.device, rounds)
    print(table("logits of a global layer", logits))

    stock, accelerated = inference[STOCK], inference[OURS]
    features = (stock.result[0], accelerated.result[0])
    title = "SAM ViT-B image encoder, stock and accelerated"
    if rounds > 1:  # one run is no measurement
        title = f"SAM ViT-B image encoder: {_seconds(stock.median)} stock, {_seconds(accelerated.median)} accelerated"
        setting += f", runs of a variant differ by up to {max(r.spread for r in inference.values()):.0%}"
    costs = {name: (runs.median, max(runs.peaks)) for name, runs in inference.items()}
    _demo_picture.save(args.output, photo, *features, title, setting, costs)
    print(f"picture: {args.output}")
    unit = max(inference[SDPA].distance(stock)[1], torch.finfo(dtype).eps)
    if accelerated.distance(stock)[1] <= 10 * unit:
        return 0
    print("accelerated and stock differ by over 10 times what stock's two classes do", file=sys.stderr)
    return 1


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


# ---- the model and the photograph


def build_model(size: int, device: str, dtype: torch.dtype, **config: Any) -> nn.Module:
    """ViT-B, or as ``config`` says; random weights of unit gain (transformers starts at 1e-10), always the same."""
    model = _empty_model(size, "eager", **config).to_empty(device=device).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.fill_(float("norm" in name and name.endswith("weight")))
            else:  # tables and positions: D**-0.5; weights: (inputs)**-0.5
                inputs = p[0].numel() if p.dim() == 4 and p.shape[0] > 1 else p.shape[-1]
                p.copy_(torch.randn(p.shape, generator=generator) * inputs**-0.5)
    return model


def with_sdpa(model: Any, **config: Any) -> nn.Module:
    """The library's other attention class, on the same weights."""
    twin = _empty_model(model.config.image_size, "sdpa", **config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def _empty_model(size: int, implementation: str, **config: Any) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    options: dict[str, Any] = {"image_size": size, "attn_implementation": implementation, **config}
    with torch.device("meta"):
        return SamVisionModel(SamVisionConfig(**options))


def load_photo(size: int) -> Tensor:
    """``[3, size, size]``, 0 to 255."""
    from skimage import data

    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float()
    return F.interpolate(photo, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 255)


def normalized(photo: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((photo - mean) / std)[None]


def affordable_size(model: Any, passes: int) -> int:
    """The largest image whose ``passes`` fit our patience, judged by one layer of each kind."""
    print("timing two layers, to choose the size ...", file=sys.stderr)
    layers = model.vision_encoder.layers
    tokens = torch.randn(1, *model.vision_encoder.pos_embed.shape[1:])
    with torch.inference_mode():
        windowed, globally = [measure(partial(layers[n], tokens), "cpu")[1] for n in (0, 0, 2)][1:]
    total = passes * (8 * windowed + 4 * globally)
    fits = [s for s in SIZES if total * (s / SIZES[0]) ** 2 <= PATIENCE]
    size = fits[0] if fits else SIZES[-1]
    if size < SIZES[0]:
        wait = f"{SIZES[0]} pixels would take {total / 60:.0f} minutes"
        print(f"{wait}: using {size} (--size {SIZES[0]} insists)", file=sys.stderr)
    return size


# ---- what is measured: the encoder, and one global layer up to its logits


def inference_steps(model: Any, sdpa: Any, pixels: Tensor) -> Steps:
    def run(encoder: Any) -> Tensor:
        with torch.inference_mode():
            return encoder(pixels).last_hidden_state

    return _variants(run, model, sdpa)


def training_steps(model: Any, sdpa: Any, pixels: Tensor) -> Steps:
    def run(encoder: Any) -> Tensor:
        features = encoder(pixels).last_hidden_state
        features.float().square().mean().backward()
        encoder.zero_grad()
        return features.detach()

    return _variants(run, model, sdpa)


def _variants(run: Callable[[Any], Tensor], model: Any, sdpa: Any) -> Steps:
    def run_ours() -> Tensor:
        accelerate(sdpa)
        try:
            return run(sdpa)
        finally:
            restore(sdpa)

    return {STOCK: lambda: run(model), SDPA: lambda: run(sdpa), OURS: run_ours}


def logits_steps(model: Any, pixels: Tensor) -> Steps:
    """``q k^T`` of a global layer, with the bias as stock adds it, as we do, and without."""
    attention = model.vision_encoder.layers[2].attn
    side = pixels.shape[-1] // PATCH
    tables = (
        attention.rel_pos_h.detach(),
        attention.rel_pos_w.detach(),
        (side, side),
        (side, side),
    )
    shape = (attention.num_attention_heads, side * side, tables[0].shape[1])
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(pixels)

    def stock() -> Tensor:
        logits = query @ query.mT
        bias = attention.get_decomposed_rel_pos(query, *tables)
        return some_rows(logits + bias.reshape_as(logits))

    def ours() -> Tensor:
        return some_rows(add_decomposed_rel_pos(query @ query.mT, query, *tables, inplace=True))

    def some_rows(logits: Tensor) -> Tensor:
        return logits[:, ::61].clone()

    return {STOCK: stock, OURS: ours, "without the bias": lambda: some_rows(query @ query.mT)}
