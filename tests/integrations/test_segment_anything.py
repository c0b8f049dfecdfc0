"""segment_anything and HQ-SAM: encoders of their own packages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from stock import compare, filled


def encoder(package: str, size: int = 40) -> nn.Module:
    module = pytest.importorskip(f"{package}.modeling.image_encoder")
    torch.manual_seed(0)
    return filled(
        module.ImageEncoderViT(
            img_size=size, patch_size=8, embed_dim=32, depth=3, num_heads=2, out_chans=16, qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("package", ["segment_anything", "segment_anything_hq"])
def test_encoder(package: str, dtype: torch.dtype):
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    report = compare(lambda: encoder(package), images, modules=3, dtype=dtype)
    assert {f.library for f in report.found} == {"segment_anything"}
