"""mmpretrain: encoders of SAM and MViTv2."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from packages import bare
from stock import OnGrid, compare, filled

BACKBONES = "mmpretrain.models.backbones"


def backbone(name: str) -> Any:
    bare("mmpretrain", "mmpretrain.models", BACKBONES)  # what they import does not know today's transformers
    return importlib.import_module(f"{BACKBONES}.{name}")


def sam() -> nn.Module:
    torch.manual_seed(0)
    arch = {"embed_dims": 32, "num_layers": 3, "num_heads": 2, "feedforward_channels": 64, "global_attn_indexes": [1]}
    return filled(backbone("vit_sam").ViTSAM(arch, img_size=40, patch_size=8, out_channels=16, window_size=3))


def mvit(**more: Any) -> nn.Module:
    """Grids of queries and keys: 8x8 and 4x4, 4x4 and 4x4, 2x2 and 2x2."""
    torch.manual_seed(0)
    arch = {"embed_dims": 16, "num_layers": 3, "num_heads": 1, "downscale_indices": [1, 2]}
    return filled(backbone("mvit").MViT(arch, img_size=32, adaptive_kv_stride=2, **more))


def layer(stride_q: int, stride_kv: int, *size: int) -> nn.Module:
    torch.manual_seed(0)
    strides = {"stride_q": stride_q, "stride_kv": stride_kv}
    attention = backbone("mvit").MultiScaleAttention(16, 32, 2, rel_pos_spatial=True, input_size=(8, 8), **strides)
    attention.scale = 0.5  # not our default
    return filled(OnGrid(attention, *size))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("height, width", [(40, 40), (56, 32)])
def test_sam(height: int, width: int):
    report = compare(sam, drawn(2, 3, height, width), modules=3, dtype=torch.float64)
    assert {f.library for f in report.found} == {"mmpretrain"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sam_layer(dtype: torch.dtype):
    compare(lambda: sam().layers[1].attn, drawn(2, 7, 4, 32), modules=1, dtype=dtype)


@pytest.mark.parametrize("height, width", [(32, 32), (48, 40), (20, 28)])
@pytest.mark.parametrize("more", [{}, {"residual_pooling": False, "dim_mul_in_attention": False}], ids=str)
def test_mvit(more: dict[str, bool], height: int, width: int):
    report = compare(lambda: mvit(**more), drawn(2, 3, height, width), modules=3, dtype=torch.float64)
    assert {f.library for f in report.found} == {"mmpretrain"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_mvit_layer(strides: tuple[int, int], dtype: torch.dtype):
    compare(lambda: layer(*strides, 8, 8), drawn(2, 64, 16), modules=1, dtype=dtype)
    compare(lambda: layer(*strides, 5, 12), drawn(2, 60, 16), modules=1, dtype=dtype)


def test_size_is_returned_as_theirs():
    theirs, ours = layer(2, 1, 5, 12), layer(2, 1, 5, 12)
    relpos_cuda.accelerate(ours)
    (_, wanted), (_, got) = (module(drawn(2, 60, 16)) for module in (theirs, ours))
    assert (got, type(got)) == (wanted, type(wanted))


def test_without_relative_positions():
    report = relpos_cuda.accelerate(mvit(rel_pos_spatial=False))
    assert {f.reason for f in report.found} == {"it has no relative positions"}
