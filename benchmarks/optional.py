"""Kernels of others, from a folder that the user names; nothing of theirs is part of this project.

    flash_4.py                   segment-anything-fast's Triton kernel: half precision, 64 x 64, D 64 or 80, no backward
    deepencoder_attention.py     vLLM's Triton kernel: half precision, square, D 64, no backward
    flash_attn/                  FlashAttention 4 (flash_attn.cute): no relative positions, less work

What is not in the folder, cannot be imported, or does not take a shape is named with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .attention import peer
from .cases import Case, Inputs
from .peers import Peer, Refusals, factors


def peers_of(folder: Path, case: Case) -> tuple[list[Peer], Refusals]:
    found, refused = [], {}
    for name, (file, load) in LOADERS.items():
        try:
            if not (folder / file).exists():
                raise ImportError(f"{folder} has no {file}")
            found.append(load(name, folder / file, case))
        except (ImportError, ValueError, AttributeError) as error:
            refused[name] = str(error).split("\n")[0]
    return found, refused


def segment_anything_fast(name: str, file: Path, case: Case) -> Peer:
    must_be(case, case.q_size == (64, 64), "grids are 64 x 64")
    must_be(case, case.head_dim in (64, 80), "D is 64 or 80")
    must_be(case, case.head_dim == 80 or case.batch > 1, "with D 64, one image is computed wrongly")
    module = module_of(file)
    autotune = module._autotune
    # Blocks of 128 keys read the wrong lines, but win; and nothing is to be written into the current folder.
    module._autotune = lambda configs, run: autotune([config for config in configs if config[1] == 64], run)
    module._load_best_configs = lambda: None
    module._save_best_configs = lambda configs: None

    def run(x: Inputs) -> Tensor:
        rel_h, rel_w = factors(x)
        return module._attention_rel_h_rel_w(x.q, x.k, x.v, rel_h[..., None], rel_w[..., None, :])

    return peer(name, half_only(run), gradients=())


def vllm(name: str, file: Path, case: Case) -> Peer:
    must_be(case, case.q_size == case.k_size and not case.prefix, "queries and keys are one grid")
    must_be(case, case.head_dim == 64, "D is 64")
    triton = importlib.import_module("triton")
    stand_in = ModuleType("vllm.triton_utils")
    stand_in.triton, stand_in.tl = triton, importlib.import_module("triton.language")
    sys.modules.setdefault("vllm", ModuleType("vllm"))
    sys.modules.setdefault("vllm.triton_utils", stand_in)
    module = module_of(file)

    def run(x: Inputs) -> Tensor:
        return module.deepencoder_rel_pos_attention(x.q, x.k, x.v, *factors(x), *x.case.q_size, x.q.shape[-1] ** -0.5)

    return peer(name, half_only(run), gradients=())


def flash_attention_4(name: str, folder: Path, case: Case) -> Peer:
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    function = importlib.import_module("flash_attn.cute").flash_attn_func

    def run(x: Inputs) -> Tensor:
        out = function(*(t.transpose(1, 2) for t in (x.q, x.k, x.v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return peer(name, half_only(run), gradients=("q", "k", "v"), note="less work: no relative positions")


def half_only(run: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    def checked(x: Inputs) -> Tensor:
        if x.q.dtype == torch.float32:
            raise NotImplementedError("inputs are of half precision")
        return run(x)

    return checked


def must_be(case: Case, true: bool, what: str) -> None:
    if not true:
        raise ValueError(f"{what}, not as in {case}")


def module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"relpos_peer_{file.stem}", file)
    assert spec and spec.loader
    if spec.name not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[spec.name] = module
    return sys.modules[spec.name]


LOADERS: dict[str, tuple[str, Callable[[str, Path, Case], Peer]]] = {
    "segment-anything-fast": ("flash_4.py", segment_anything_fast),
    "vLLM": ("deepencoder_attention.py", vllm),
    "FlashAttention 4, no bias": ("flash_attn", flash_attention_4),
}
