"""MONAI: its self-attention block on a grid of two axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from stock import assert_stock_is_called, compare, count_calls, filled

monai = pytest.importorskip("monai")


def block(size: tuple[int, ...] = (5, 3), **more: Any) -> nn.Module:
    torch.manual_seed(0)
    block = monai.networks.blocks.SABlock(32, 2, input_size=size, **{"rel_pos_embedding": "decomposed", **more})
    block.scale = 0.5  # not our default
    return filled(block)


def tokens() -> Tensor:
    return torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block(dtype: torch.dtype):
    report = compare(block, tokens(), modules=1, dtype=dtype)
    assert [f.library for f in report.found] == ["monai"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_combined_linear": False, "qkv_bias": True},
        {"dim_head": 24, "hidden_input_size": 32},
        {"include_fc": False},
        {"dropout_rate": 0.5},  # without effect in eval
    ],
    ids=str,
)
def test_options(options: dict[str, Any]):
    compare(lambda: block(**options).eval(), tokens(), modules=1)


def test_interpolated_tables():
    """Nothing but an assignment makes them so."""

    def resized() -> nn.Module:
        module = block((3, 4))
        module.rel_positional_embedding.s_input_dims = (5, 3)
        return module

    compare(resized, tokens(), modules=1)


LEFT = [{"save_attn": True}, {"causal": True, "sequence_length": 15}, {"dropout_rate": 0.5}]


@pytest.mark.parametrize("options", LEFT, ids=str)
def test_calls_left_to_monai(options: dict[str, Any]):
    theirs, ours = block(**options), block(**options)
    assert relpos_cuda.accelerate(ours).replaced
    assert_stock_is_called(theirs, ours, tokens())


def test_dropout_of_the_output_is_fused():
    theirs, ours = block(dropout_rate=0.5), block(dropout_rate=0.5)
    relpos_cuda.accelerate(ours)
    outs = []
    with count_calls() as calls:
        for module in theirs, ours:
            module.drop_weights.eval()
            torch.manual_seed(3)
            outs.append(module(tokens()))
    assert calls == [1]
    torch.testing.assert_close(*outs)


def test_masks_are_left_to_monai():
    theirs, ours = block(), block()
    relpos_cuda.accelerate(ours)
    assert_stock_is_called(theirs, ours, tokens(), torch.arange(15).expand(2, 15) < 12)


def test_attention_dtype():
    """Another one than that of the values works under autocast only, and with monai only."""
    theirs, ours = (block(attention_dtype=torch.bfloat16) for _ in range(2))
    relpos_cuda.accelerate(ours)
    with torch.autocast("cpu"):
        assert_stock_is_called(theirs, ours, tokens())
    compare(lambda: block(attention_dtype=torch.float64), tokens(), modules=1, dtype=torch.float64)


def test_hooked_weights_are_left_to_monai():
    module = block().eval()
    seen: list[Tensor] = []
    module.drop_weights.register_forward_hook(lambda _, args, out: seen.append(out))
    relpos_cuda.accelerate(module)
    module(tokens())
    assert [list(weights.shape) for weights in seen] == [[2, 2, 15, 15]]


@pytest.mark.parametrize("size, positions", [((3, 3, 3), "decomposed"), ((5, 3), None)], ids=str)
def test_blocks_left_to_monai(size: tuple[int, ...], positions: str | None):
    report = relpos_cuda.accelerate(block(size, rel_pos_embedding=positions))
    reason = "it has no relative positions" if positions is None else "with three axes, monai's formula is another"
    assert [f.reason for f in report.found] == [reason]
