"""Direct callers of the ops get errors in words, never a wrong read or write."""

from __future__ import annotations

import pytest
import torch

import relpos_cuda
from test_errors import good


def op_arguments() -> dict:
    g = good()
    grids = (g["q_size"], g["k_size"])
    return {
        "out": torch.zeros_like(g["attn"]),
        "attn": g["attn"],
        "q": g["q"],
        "table": relpos_cuda.tables.stack([g["rel_pos_h"], g["rel_pos_w"]], *grids),
        "index": relpos_cuda.tables.lookup(*grids, torch.device("cpu")),
        "q_size": grids[0],
        "k_size": grids[1],
        "num_prefix_tokens": 0,
    }


FORWARD = [
    ("out", torch.zeros(2, 3, 20, 19), "out must have 2400 elements, got 2280"),
    ("out", torch.zeros(2, 3, 20, 20).mT, "out must be contiguous"),
    ("out", torch.zeros(2, 3, 20, 20).double(), "out is float64, q is float32|attn must be float64, got float32"),
    ("attn", torch.zeros(2, 3, 20, 20).half(), "attn must be float32, got float16"),
    ("q", torch.zeros(2, 3, 20, 9), r"table must be contiguous \[16, 9\]"),
    ("q", torch.zeros(2, 3, 19, 8), "q has 19 tokens, the grid has 20"),
    ("q", torch.zeros(2, 3, 8, 20).mT, "the last axis of q must be contiguous"),
    ("q", torch.zeros(20, 8), r"q must be \[B, heads, S, D\] or .* got 2 dimensions"),
    ("table", torch.zeros(16, 7), r"table must be contiguous \[16, 8\]"),
    ("table", torch.zeros(16, 8).half(), "table is float16, q is float32"),
    ("index", torch.zeros(10, dtype=torch.int32), "index must have 114 elements, got 10"),
    ("index", torch.zeros(114, dtype=torch.int64), "index must be int32"),
    ("q_size", (4, 5, 1), r"q_size and k_size must both be \(h, w\) or \(t, h, w\)"),
    ("k_size", (0, 5), r"k_size\[0\] must be at least 1 and less than 2\^24, got 0"),
    ("q_size", (4, 1 << 24), r"q_size\[1\] must be at least 1 and less than 2\^24, got 16777216"),
    ("k_size", (65536, 65536), r"k_size has 2\^31 tokens or more"),
    ("q_size", (65536, 32768), r"q_size has 2\^31 tokens or more"),
    ("num_prefix_tokens", -1, "num_prefix_tokens is out of range: -1"),
]


@pytest.mark.parametrize("name,value,message", FORWARD)
def test_forward_op(name: str, value, message: str, device: str):
    arguments = op_arguments()
    if device == "cuda":
        pytest.skip("the same checks, compiled once")
    relpos_cuda._ops.logits_fwd(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        relpos_cuda._ops.logits_fwd(*(arguments | {name: value}).values())


@pytest.mark.parametrize("value", [10**9, -1, 16])
@pytest.mark.parametrize("op", ["logits_fwd", "logits_bwd", "attention_fwd"])
def test_an_index_is_not_followed_out_of_the_table(op: str, value: int):
    """On the CPU, where it can be looked at: a GPU trusts it."""
    forward = op_arguments()
    index = forward["index"].clone()
    index[7] = value
    shared = (forward["table"], index)
    grids = (forward["q_size"], forward["k_size"], 0)
    q, logits = forward["q"], forward["attn"]
    calls = {
        "logits_fwd": (forward["out"], logits, q, *shared, *grids),
        "logits_bwd": (torch.empty_like(q), None, logits, q, *shared, None, None, *grids),
        "attention_fwd": (torch.empty_like(q), None, q, q, q, *shared, *grids, 1.0),
    }
    with pytest.raises(RuntimeError, match=f"index must name rows 0 to 6 of the table for an axis, got .*{value}"):
        getattr(relpos_cuda._ops, op)(*calls[op])


def test_axes_too_long_for_the_index(device: str):
    long = {"q": torch.zeros(1, 1, 200, 8), "q_size": (1, 200), "k_size": (1, (1 << 24) - 1)}
    with pytest.raises(RuntimeError, match="the axes are too long for a 32-bit index"):
        relpos_cuda._ops.logits_fwd(*(op_arguments() | long).values())


BACKWARD = [
    ("dq", torch.zeros(2, 3, 20, 7), "dq must have 960 elements, got 840"),
    ("dtable", torch.zeros(16, 8).half(), "dtable must be float32, got float16"),
    ("grad", torch.zeros(2, 3, 20, 20).mT, "grad must be contiguous"),
    ("q", torch.zeros(2, 3, 20, 8).double(), "table is float32, q is float64"),
]
WORK_SPACES = [
    ("factors", None, "dtable needs the work spaces factors and partials"),
    ("factors", torch.zeros(120, 8), "factors must have 1080 elements, got 960"),
    ("partials", torch.zeros(2, 40, 8), r"partials must be \[splits, 41, 8\]"),
    ("partials", torch.zeros(2, 41, 8).double(), "partials must be float32, got float64"),
    ("partials", torch.zeros(657)[1:].view(2, 41, 8), "partials must start at a multiple of 16 bytes"),
]


@pytest.mark.parametrize("name,value,message", [*BACKWARD, *WORK_SPACES])
def test_backward_op(name: str, value, message: str, device: str, request: pytest.FixtureRequest):
    forward = op_arguments()
    emulated = "emulated" in request.node.name
    if device == "cuda" or (name in ("factors", "partials") and not emulated):
        pytest.skip("covered by the emulated GPU, the only one with work spaces here")
    arguments = {
        "dq": torch.zeros_like(forward["q"]),
        "dtable": torch.zeros_like(forward["table"]),
        "grad": forward["attn"],
        "q": forward["q"],
        "table": forward["table"],
        "index": forward["index"],
        "factors": torch.zeros(120, 9),
        "partials": torch.zeros(2, 41, 8),
        "q_size": forward["q_size"],
        "k_size": forward["k_size"],
        "num_prefix_tokens": 0,
    }
    relpos_cuda._ops.logits_bwd(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        relpos_cuda._ops.logits_bwd(*(arguments | {name: value}).values())


def test_misaligned_table(device: str, request: pytest.FixtureRequest):
    if "emulated" not in request.node.name:
        pytest.skip("a check of the CUDA launcher")
    arguments = op_arguments()
    shifted = torch.zeros(16 * 8 + 1)[1:].view(16, 8)
    with pytest.raises(RuntimeError, match="table must start at a multiple of 16 bytes"):
        relpos_cuda._ops.logits_fwd(*(arguments | {"table": shifted}).values())
