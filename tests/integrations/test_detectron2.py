"""detectron2: ViTDet and MViTv2. It is not on PyPI; RELPOS_DETECTRON2 names a folder with its sources, not compiled."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from stock import compare, filled

SOURCES = os.environ.get("RELPOS_DETECTRON2")
pytestmark = pytest.mark.skipif(not SOURCES, reason="RELPOS_DETECTRON2 names no sources")


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SOURCES)


def vit() -> nn.Module:
    module = importlib.import_module("detectron2.modeling.backbone.vit")
    torch.manual_seed(0)
    return filled(
        module.ViT(
            img_size=40, patch_size=8, embed_dim=32, depth=3, num_heads=2, use_rel_pos=True, window_size=3,
            window_block_indexes=(0, 2), residual_block_indexes=(1,), pretrain_img_size=40,
        )
    )  # fmt: skip


def mvit(**more: Any) -> nn.Module:
    """Grids of queries and keys: windows of 4x4 and 2x2, and of 2x2 and 2x2; 16x16 and 4x4, 8x8 and 4x4 whole."""
    module = importlib.import_module("detectron2.modeling.backbone.mvit")
    torch.manual_seed(0)
    given = {"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 1, "last_block_indexes": (0, 1, 3)}
    given |= {"adaptive_kv_stride": 2, "adaptive_window_size": 4, "out_features": ("scale4",)}
    return filled(module.MViT(**(given | more)))


def layer(window_size: int, stride_q: int, stride_kv: int) -> nn.Module:
    module = importlib.import_module("detectron2.modeling.backbone.mvit")
    torch.manual_seed(1)
    more = {"stride_q": stride_q, "stride_kv": stride_kv, "window_size": window_size}
    attention = module.MultiScaleAttention(16, 32, 2, use_rel_pos=True, input_size=(8, 8), **more)
    attention.scale = 0.5  # not our default
    return filled(attention)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("height, width", [(40, 40), (56, 32)])
def test_vit(height: int, width: int):
    report = compare(vit, drawn(2, 3, height, width), modules=3, dtype=torch.float64)
    assert {f.library for f in report.found} == {"segment_anything"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vit_layer(dtype: torch.dtype):
    compare(lambda: vit().blocks[1].attn, drawn(2, 7, 4, 32), modules=1, dtype=dtype)


@pytest.mark.parametrize("height, width", [(64, 64), (48, 40), (36, 76)])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_mvit(residual: bool, height: int, width: int):
    make = lambda: mvit(residual_pooling=residual)  # noqa: E731
    report = compare(make, drawn(2, 3, height, width), modules=4, dtype=torch.float64)
    assert {f.library for f in report.found} == {"detectron2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("window_size", [0, 4], ids=["whole", "windows"])
def test_mvit_layer(window_size: int, strides: tuple[int, int], dtype: torch.dtype):
    compare(lambda: layer(window_size, *strides), drawn(2, 8, 8, 16), modules=1, dtype=dtype)
    compare(lambda: layer(window_size, *strides), drawn(2, 5, 12, 16), modules=1, dtype=dtype)


def test_mvit_without_relative_positions():
    report = relpos_cuda.accelerate(mvit(use_rel_pos=False))
    assert {f.reason for f in report.found} == {"it has no relative positions"}
