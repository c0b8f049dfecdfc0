"""timm: VisionTransformerSAM and MultiScaleVit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from stock import OnGrid, assert_stock_is_called, compare, count_calls, filled

timm = pytest.importorskip("timm")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def sam(eager: bool = False, use_rel_pos: bool = True, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.vision_transformer_sam.VisionTransformerSAM(
        img_size=40, patch_size=8, embed_dim=32, depth=3, num_heads=2, window_size=3, global_attn_indexes=(1,),
        neck_chans=16, num_classes=5, use_rel_pos=use_rel_pos, **more,
    )  # fmt: skip
    for block in model.blocks:
        block.attn.fused_attn = not eager
    return filled(model)


def sam_layer() -> nn.Module:
    torch.manual_seed(0)
    attention = timm.models.vision_transformer_sam.Attention
    return filled(attention(96, 2, qk_norm=True, use_rel_pos=True, input_size=(5, 5)))


def mvit(tables_of: tuple[int, int] = (32, 32), **more: Any) -> nn.Module:
    """Grids of queries and keys: 8x8 and 4x4, 4x4 and 8x8, 4x4 and 4x4; and tables for images of another size."""
    torch.manual_seed(0)
    given = dict(num_heads=(1, 2), stride_q=((1, 1), (2, 2)), stride_kv_adaptive=(2, 2)) | more
    cfg = timm.models.mvitv2.MultiScaleVitCfg(depths=(1, 2), embed_dim=(16, 32), **given)
    model = timm.models.mvitv2.MultiScaleVit(cfg, img_size=32, num_classes=5)
    for module in model.modules():
        if hasattr(module, "rel_pos_h"):
            length, head_dim = module.rel_pos_h.shape
            sizes = ((length + 1) // 2 * pixels // 32 for pixels in tables_of)
            module.rel_pos_h, module.rel_pos_w = (nn.Parameter(torch.zeros(2 * n - 1, head_dim)) for n in sizes)
    return filled(model)


def mvit_layer(grid: tuple[int, int] = (8, 8), rows: int = 15, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    given = dict(num_heads=2, kernel_q=(3, 3), kernel_kv=(3, 3), stride_kv=(2, 2)) | more
    attention = timm.models.mvitv2.MultiScaleAttention(96, 96, (8, 8), **given)
    attention.rel_pos_h, attention.rel_pos_w = (nn.Parameter(torch.zeros(rows, 48)) for _ in range(2))
    return filled(OnGrid(attention, *grid))


@pytest.mark.parametrize("size", [(40, 40), (24, 48)], ids=str)
def test_sam(size: tuple[int, int]):
    report = compare(sam, drawn(2, 3, *size), modules=3, dtype=torch.float64)
    assert {f.library for f in report.found} == {"timm"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(5, 5), (7, 4)], ids=str)
def test_sam_layer(grid: tuple[int, int], dtype: torch.dtype):
    compare(sam_layer, drawn(2, *grid, 96), modules=1, dtype=dtype)


SAMS = [{"qk_norm": True}, {"eager": True}, {"qkv_bias": False, "attn_drop_rate": 0.5}]


@pytest.mark.parametrize("more", SAMS, ids=str)
def test_sam_of_other_kinds(more: dict[str, Any]):
    compare(lambda: sam(**more).eval(), drawn(2, 3, 40, 32), modules=3, dtype=torch.float64)


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
def test_sam_with_dropout_is_stock_in_training(eager: bool):
    theirs, ours = (sam(eager, attn_drop_rate=0.5, proj_drop_rate=0.5) for _ in range(2))
    relpos_cuda.accelerate(ours)
    assert_stock_is_called(theirs, ours, drawn(2, 3, 40, 40))
    if eager:
        for model in (theirs, ours):
            model.eval()
            for block in model.blocks:
                block.attn.attn_drop.train()  # eager asks nobody else
        assert_stock_is_called(theirs, ours, drawn(2, 3, 40, 40))


def test_sam_with_dropout_of_the_projection_is_fused():
    theirs, ours = (sam(proj_drop_rate=0.5) for _ in range(2))
    relpos_cuda.accelerate(ours)
    outputs = []
    with count_calls() as calls:
        for model in (theirs, ours):
            torch.manual_seed(3)
            outputs.append(model(drawn(2, 3, 40, 40)))
    assert calls == [3]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_attention_is_there_for_those_who_extract_it(method: str):
    make, size = (partial(sam, eager=True), 40) if method == "hook" else (mvit, 32)
    theirs, ours = make(), make()
    relpos_cuda.accelerate(ours)
    wanted, got = (timm.utils.AttentionExtract(m, method=method)(drawn(2, 3, size, size)) for m in (theirs, ours))
    assert len(wanted) == 3
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


KINDS = [
    {},
    {"use_cls_token": True},
    {"use_cls_token": True, "residual_pooling": False},
    {"mode": "max", "qkv_bias": False},
    {"mode": "avg", "use_cls_token": True, "kernel_qkv": (1, 1)},
    {"expand_attn": False, "num_heads": (2, 2)},
]


@pytest.mark.parametrize("more", KINDS, ids=str)
def test_mvit(more: dict[str, Any]):
    compare(lambda: mvit(**more), drawn(2, 3, 32, 32), modules=3, dtype=torch.float64)
    compare(lambda: mvit((24, 48), **more).eval(), drawn(2, 3, 24, 48), modules=3, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("has_cls_token", [False, True], ids=["grid", "class_token"])
def test_mvit_layer(has_cls_token: bool, strides: tuple[int, int], dtype: torch.dtype):
    q, kv = strides
    make = partial(mvit_layer, stride_q=(q, q), stride_kv=(kv, kv), has_cls_token=has_cls_token)
    compare(make, drawn(2, has_cls_token + 64, 96), modules=1, dtype=dtype)


@pytest.mark.parametrize("size", [(28, 28), (20, 32), (16, 12)], ids=str)
def test_mvit_reads_the_first_rows_for_smaller_images(size: tuple[int, int]):
    compare(lambda: mvit(use_cls_token=True), drawn(2, 3, *size), modules=3, dtype=torch.float64)


@pytest.mark.parametrize("size", [(36, 32), (32, 64)], ids=str)
def test_mvit_raises_for_larger_images(size: tuple[int, int]):
    model = mvit()
    for _ in range(2):
        with pytest.raises(IndexError):
            model(drawn(2, 3, *size))
        relpos_cuda.accelerate(model)


def test_mvit_is_stock_where_a_shorter_table_will_do():
    theirs, ours = (mvit_layer((9, 9), rows=16) for _ in range(2))  # 9 queries and 5 keys: 17 rows, the last one unused
    relpos_cuda.accelerate(ours)
    assert_stock_is_called(theirs, ours, drawn(2, 1 + 81, 96))


def test_those_without_tables_are_left_alone():
    for model in (sam(use_rel_pos=False), sam(use_rel_pos=False, use_rope=True), mvit(rel_pos_type="none")):
        report = relpos_cuda.accelerate(model)
        assert {f.reason for f in report.found} == {"it has no relative positions"}
        assert len(report.skipped) == 3


def test_pool_first_is_left_alone():
    model = mvit(pool_first=True)
    report = relpos_cuda.accelerate(model)
    assert len(report.skipped) == 3
    assert "does not transpose its keys" in report.found[0].reason
    with pytest.raises(RuntimeError):  # once this is no more, there is something to accelerate
        model(drawn(2, 3, 32, 32))
