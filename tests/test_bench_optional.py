"""Kernels of others in the benchmark, from a folder that the user names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import attention, optional
from benchmarks.cases import square

FLASH_4 = """
import torch
seen = []
def _autotune(configs, run):
    return min(configs), 0
def _attention_rel_h_rel_w(q, k, v, rel_h, rel_w):
    seen.append(_autotune([(64, 128), (128, 64)], None)[0])
    bias = (rel_h + rel_w).view(*q.shape[:3], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
"""
DEEPENCODER = """
import torch
from vllm.triton_utils import tl, triton
def deepencoder_rel_pos_attention(q, k, v, rel_h, rel_w, height, width, scale):
    assert rel_h.shape == (*q.shape[:3], height) and rel_w.shape == (*q.shape[:3], width)
    bias = (rel_h[..., None] + rel_w[..., None, :]).flatten(-2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
"""
FLASH_ATTENTION = """
import torch
def flash_attn_func(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None
"""


def test_kernels_of_others_are_called_as_their_libraries_call_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins with the signatures of the real ones: what is tested is what we pass, and what we make of it."""
    for name in ("triton", "triton.language"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("vllm", "vllm.triton_utils", "relpos_peer_flash_4", "relpos_peer_deepencoder_attention"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tmp_path.joinpath("flash_4.py").write_text(FLASH_4)
    tmp_path.joinpath("deepencoder_attention.py").write_text(DEEPENCODER)
    tmp_path.joinpath("flash_attn").mkdir()
    tmp_path.joinpath("flash_attn", "cute.py").write_text(FLASH_ATTENTION)

    case = square("sam", 2, 1, 64, 64)
    peers, refused = optional.peers_of(tmp_path, case)
    assert refused == {} and [p.name for p in peers] == list(optional.LOADERS)
    x = attention.draw(case, torch.bfloat16, "cpu")
    ours, no_bias = attention.ours(x), attention.no_bias(x)
    for peer in peers:
        expected = ours if peer.same_work else no_bias
        torch.testing.assert_close(peer.on(x).forward(), expected, rtol=0.05, atol=0.05)
        with pytest.raises(NotImplementedError, match="half precision"):
            peer.on(attention.draw(square("square", 2, 2, 6, 16), torch.float32, "cpu")).forward()
    assert [p.gradients for p in peers] == [(), (), ("q", "k", "v")]
    assert sys.modules["relpos_peer_flash_4"].seen == [(128, 64)], "blocks of 128 keys are left out"

    refused = optional.peers_of(tmp_path, square("small", 1, 1, 32, 64))[1]
    assert refused["segment-anything-fast"].startswith("grids are 64 x 64, not as in small")
    refused = optional.peers_of(tmp_path, square("one_image", 1, 1, 64, 64))[1]
    assert refused["segment-anything-fast"].startswith("with D 64, one image")
    assert len(optional.peers_of(tmp_path / "nothing", case)[1]) == 3
