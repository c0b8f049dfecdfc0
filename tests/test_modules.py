"""RelPosAttention, the module."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import relpos_cuda
from checks import assert_close_as_eager
from stock import filled

pytest.importorskip("transformers")

from test_transformers import build


def module(**changes: object) -> relpos_cuda.RelPosAttention:
    torch.manual_seed(0)
    return filled(relpos_cuda.RelPosAttention(**{"dim": 32, "num_heads": 2, "input_size": (5, 5)} | changes))


@pytest.mark.parametrize("grid", [(5, 5), (3, 7)], ids=str)
def test_it_is_the_attention_of_sam(grid: tuple[int, int]):
    """The same state_dict, and the same numbers."""
    sam, ours = build("sam", "SamVisionAttention", "SamVisionConfig", 0), module()
    ours.load_state_dict(sam.state_dict())
    x = torch.randn(2, *grid, 32)
    torch.testing.assert_close(ours(x), sam(x)[0])
    assert len(relpos_cuda.accelerate(ours).found) == 1, "nothing is left to be done"


def test_every_parameter_learns_and_the_module_moves():
    ours, x = module(qkv_bias=False), torch.randn(2, 4, 6, 32)
    ours(x).square().sum().backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        "qkv.weight", "proj.weight", "proj.bias", "rel_pos_h", "rel_pos_w",
    }  # fmt: skip
    assert "num_heads=2, tables for 5 x 5" in repr(ours)
    assert relpos_cuda.RelPosAttention(8, 1, (2, 3), device="meta", dtype=torch.half).rel_pos_w.shape == (5, 8)


def test_it_moves_to_another_dtype(monkeypatch: pytest.MonkeyPatch):
    ours, x = module().to(torch.bfloat16), torch.randn(2, 4, 6, 32).bfloat16()
    exact, got = copy.deepcopy(ours).double()(x.double()), ours(x)
    monkeypatch.setattr(relpos_cuda.modules, "rel_pos_attention", relpos_cuda.reference.rel_pos_attention)
    assert_close_as_eager(got, ours(x), exact, "out")


def test_tables_start_at_zero():
    fresh = relpos_cuda.RelPosAttention(8, 2, (3, 4))
    assert fresh.rel_pos_h.shape == (5, 4) and fresh.rel_pos_w.shape == (7, 4)
    assert not fresh.rel_pos_h.any() and not fresh.rel_pos_w.any()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_heads": 3}, "dim must be a multiple of num_heads = 3, got 32"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"dim": -8}, "dim must be at least 1, got -8"),
        ({"input_size": (5,)}, r"input_size must be \(h, w\), got \(5,\)"),
        ({"input_size": (5, 0)}, r"input_size\[1\] must be at least 1, got 0"),
        ({"input_size": (4.5, 4)}, r"input_size\[0\] must be an int, got 4.5"),
    ],
)
def test_refusals(changes: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        module(**changes)


@pytest.mark.parametrize("shape", [(5, 5, 32), (1, 5, 5, 31), (1, 0, 5, 32), (1, 5, 0, 32)])
def test_the_shape_of_the_input(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=re.escape(f"x must be [B, H, W, 32], got {list(shape)}")):
        module()(torch.zeros(shape))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        module()([0.0])


def test_an_empty_batch():
    ours, x = module(), torch.zeros(0, 4, 6, 32, requires_grad=True)
    out = ours(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape and not any(p.grad.any() for p in ours.parameters())
