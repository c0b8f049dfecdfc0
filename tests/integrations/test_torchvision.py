"""torchvision: MViT for video."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from stock import OnGrid, assert_stock_is_called, compare, filled, first_tensor

pytest.importorskip("torchvision")
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.video import mvit


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def model(
    size: tuple[int, int, int] = (8, 32, 48), built_for: tuple[int, int, int] | None = None, **more: Any
) -> nn.Module:
    """mvit_v2_s with three blocks: of 4x8x12 tokens on 4x2x3, of 4x4x6 on 4x4x6, of 4x4x6 on 4x2x3, if for its size."""
    torch.manual_seed(0)
    given = dict(residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True) | more
    every, half, quarter = ([1, n, n] for n in (1, 2, 4))
    block = partial(mvit.MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3])
    blocks = [
        block(1, 16, 16, stride_q=every, stride_kv=quarter),
        block(2, 16, 32, stride_q=half, stride_kv=half),
        block(2, 32, 32, stride_q=every, stride_kv=half),
    ]
    frames, *pixels = built_for or size
    net = mvit.MViT(tuple(pixels), frames, blocks, num_classes=5, dropout=0.0, **given)
    net.pos_encoding.temporal_size, net.pos_encoding.spatial_size = size[0] // 2, (size[1] // 4, size[2] // 4)
    return filled(net)


def layer(*grid: int, q: int = 1, kv: int = 1, **more: Any) -> nn.Module:
    """With pooling of queries and of keys by these strides."""
    torch.manual_seed(0)
    given = dict(kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3], stride_q=[1, q, q], stride_kv=[1, kv, kv])
    given |= dict(residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True) | more
    return filled(OnGrid(mvit.MultiscaleAttention(list(grid), 96, 96, 2, **given), *grid))


KINDS = [{}, {"residual_with_cls_embed": True}, {"residual_pool": False}, {"proj_after_attn": False}]


@pytest.mark.parametrize("more", KINDS, ids=str)
def test_model(more: dict[str, Any]):
    report = compare(lambda: model(**more), drawn(2, 3, 8, 32, 48), modules=3, dtype=torch.float64)
    assert {f.library for f in report.found} == {"torchvision"}


@pytest.mark.parametrize("size", [(8, 32, 32), (12, 24, 40), (4, 36, 28)], ids=str)
def test_model_for_another_size(size: tuple[int, int, int]):
    compare(lambda: model(size, built_for=(8, 32, 32)).eval(), drawn(1, 3, *size), modules=3, dtype=torch.float64)


def test_model_on_a_single_image():
    """Which it takes for a video of one frame, on one row of the temporal table."""
    make = partial(model, (2, 32, 48), patch_embed_kernel=(1, 7, 7), patch_embed_padding=(0, 3, 3))
    compare(make, drawn(2, 3, 32, 48), modules=3, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", [(1, 4), (2, 1), (1, 1)], ids=str)
def test_layer(strides: tuple[int, int], dtype: torch.dtype):
    q, kv = strides
    compare(lambda: layer(3, 4, 8, q=q, kv=kv), drawn(2, 1 + 96, 96), modules=1, dtype=dtype)


@pytest.mark.parametrize("which", ["q", "kv"])
def test_layer_without_pooling(which: str):
    none: dict[str, Any] = {f"kernel_{which}": [], f"stride_{which}": []}
    compare(lambda: layer(3, 4, 8, kv=2, **none), drawn(2, 1 + 96, 96), modules=1, dtype=torch.float64)


def test_layer_without_an_integer_ratio():
    """Nine queries and five keys have the same rows by either formula; 39 and 10 have not."""
    compare(lambda: layer(2, 9, 4, kv=2), drawn(2, 1 + 72, 96), modules=1, dtype=torch.float64)
    for grid in ((2, 39, 4), (2, 4, 39)):
        theirs, ours = (layer(*grid, kv=4) for _ in range(2))
        relpos_cuda.accelerate(ours)
        assert_stock_is_called(theirs, ours, drawn(1, 1 + 312, 96))


def test_features_are_extracted_from_stock():
    """By tracing, which needs PyTorch's own functions."""
    theirs, ours = model().eval(), model().eval()
    relpos_cuda.accelerate(ours)
    wanted, got = (
        create_feature_extractor(m, ["blocks.1.attn.softmax"])(drawn(1, 3, 8, 32, 48)) for m in (theirs, ours)
    )
    assert torch.equal(first_tensor(got), first_tensor(wanted))


def test_its_dropout_is_of_the_projection():
    theirs, ours = (layer(3, 4, 8, dropout=0.5) for _ in range(2))
    relpos_cuda.accelerate(ours)
    outputs = []
    for net in (theirs, ours):
        torch.manual_seed(3)
        outputs.append(net(drawn(2, 1 + 96, 96))[0])
    torch.testing.assert_close(*outputs)


def test_one_without_tables_is_left_alone():
    report = relpos_cuda.accelerate(model(rel_pos_embed=False))
    assert [f.reason for f in report.skipped] == ["it has no relative positions"] * 3
