"""Bad input: the argument, what was wanted, what was given, before anything runs."""

from __future__ import annotations

import pytest
import torch

import relpos_cuda


def good(**changes) -> dict:
    arguments = {
        "attn": torch.zeros(2, 3, 20, 20),
        "q": torch.zeros(2, 3, 20, 8),
        "rel_pos_h": torch.zeros(7, 8),
        "rel_pos_w": torch.zeros(9, 8),
        "q_size": (4, 5),
        "k_size": (4, 5),
    }
    return arguments | changes


def test_the_good_arguments_are_good():
    relpos_cuda.add_decomposed_rel_pos(**good())


ATTN = [
    ({"attn": None}, TypeError, "attn must be a tensor, got NoneType"),
    ({"attn": torch.zeros(2, 3, 20, 19)}, ValueError, r"attn must be \[\.\.\., 20, 20\].*got \[2, 3, 20, 19\]"),
    ({"attn": torch.zeros(5, 20, 20)}, ValueError, r"attn must be .* 6 = 2 \* 3 matrices, got \[5, 20, 20\]"),
    ({"attn": torch.zeros(6, 400)}, ValueError, r"attn must be .*got \[6, 400\]"),
    ({"attn": torch.zeros(400)}, ValueError, r"attn must be .*got \[400\]"),
    ({"attn": torch.zeros(2, 3, 20, 20, dtype=torch.int32)}, TypeError, r"attn must be torch.float32.*got torch.int32"),
    ({"attn": torch.zeros(2, 3, 20, 20).half()}, TypeError, r"attn must be torch.float32 like q.*got torch.float16"),
    ({"attn": torch.zeros(2, 3, 20, 20).double()}, TypeError, r"attn must be .*got torch.float64"),
    ({"attn": torch.zeros(2, 3, 20, 20, device="meta")}, ValueError, r"attn must be on cpu like q, got meta"),
]
QUERIES = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"q": torch.zeros(20, 8)}, ValueError, r"q must be \[B, heads, S, D\] or .*got \[20, 8\]"),
    ({"q": torch.zeros(1, 2, 3, 20, 8)}, ValueError, r"q must be \[B, heads, S, D\]"),
    ({"q": torch.zeros(2, 3, 19, 8)}, ValueError, r"q must have S = 4 \* 5 = 20 tokens, got 19"),
    ({"q": torch.zeros(2, 3, 20, 0)}, ValueError, r"q must be .*got \[2, 3, 20, 0\]"),
    ({"q": torch.zeros(2, 3, 20, 8, dtype=torch.int64)}, TypeError, r"q must be float16.*got torch.int64"),
    ({"q": torch.zeros(2, 3, 20, 8, dtype=torch.complex64)}, TypeError, r"q must be .*got torch.complex64"),
    ({"q": torch.zeros(2, 3, 20, 8, device="meta")}, ValueError, r"rel_pos_h must be on meta like q, got cpu"),
]
TABLES = [
    ({"rel_pos_h": None}, TypeError, "rel_pos_h must be a tensor, got NoneType"),
    ({"rel_pos_w": torch.zeros(9, 8).numpy()}, TypeError, "rel_pos_w must be a tensor, got ndarray"),
    (
        {"q": torch.zeros(2, 3, 20, 8, device="meta"), "rel_pos_h": torch.zeros(7, 8, device="meta").half()},
        TypeError,
        "rel_pos_h must be torch.float32 like q.*got torch.float16",
    ),
    ({"rel_pos_h": torch.zeros(7, 9)}, ValueError, r"rel_pos_h must be \[L, 8\], got \[7, 9\]"),
    ({"rel_pos_w": torch.zeros(9)}, ValueError, r"rel_pos_w must be \[L, 8\], got \[9\]"),
    ({"rel_pos_w": torch.zeros(1, 9, 8)}, ValueError, r"rel_pos_w must be \[L, 8\], got \[1, 9, 8\]"),
    ({"rel_pos_h": torch.zeros(0, 8)}, ValueError, r"rel_pos_h must be \[L, 8\], got \[0, 8\]"),
    ({"rel_pos_h": torch.zeros(7, 8, dtype=torch.int32)}, TypeError, r"rel_pos_h must be floating point, got"),
    ({"rel_pos_w": torch.zeros(9, 8).half()}, TypeError, r"rel_pos_w must be torch.float32 like q.*got torch.float16"),
    ({"rel_pos_w": torch.zeros(9, 8, device="meta")}, ValueError, r"rel_pos_w must be on cpu like q, got meta"),
    (
        {"rel_pos_t": torch.zeros(3, 9), "q_size": (1, 4, 5), "k_size": (1, 4, 5)},
        ValueError,
        r"rel_pos_t must be \[L, 8\], got \[3, 9\]",
    ),
]
SIZES = [
    ({"q_size": (4, 6)}, ValueError, r"q must have S = 4 \* 6 = 24 tokens, got 20"),
    ({"k_size": (5, 5)}, ValueError, r"attn must be \[\.\.\., 20, 25\]"),
    ({"q_size": (20,)}, ValueError, r"q_size must be \(h, w\), got \(20,\)"),
    ({"k_size": (1, 4, 5)}, ValueError, r"k_size must be \(h, w\), got \(1, 4, 5\)"),
    (
        {"rel_pos_t": torch.zeros(1, 8)},
        ValueError,
        r"q_size must be \(t, h, w\), because rel_pos_t is given, got \(4, 5\)",
    ),
    ({"q_size": 20}, ValueError, r"q_size must be \(h, w\), got 20"),
    ({"q_size": torch.tensor([4, 5])}, ValueError, r"q_size must be \(h, w\), got tensor"),
    ({"q_size": (0, 5)}, ValueError, r"q_size\[0\] must be at least 1, got 0"),
    ({"k_size": (4, -5)}, ValueError, r"k_size\[1\] must be at least 1, got -5"),
    ({"q_size": (4.0, 5)}, TypeError, r"q_size\[0\] must be an int, got 4.0"),
    ({"k_size": (4, None)}, TypeError, r"k_size\[1\] must be an int, got None"),
    ({"k_size": ((4,), 5)}, TypeError, r"k_size\[0\] must be an int, got \(4,\)"),
    ({"num_prefix_tokens": -1}, ValueError, r"num_prefix_tokens must be at least 0, got -1"),
    ({"num_prefix_tokens": 1}, ValueError, r"q must have S = 4 \* 5 \+ 1 prefix = 21 tokens, got 20"),
    ({"num_prefix_tokens": True}, TypeError, r"num_prefix_tokens must be an int, got True"),
]


@pytest.mark.parametrize("changes,error,message", [*ATTN, *QUERIES, *TABLES, *SIZES])
def test_add_decomposed_rel_pos(changes: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        relpos_cuda.add_decomposed_rel_pos(**good(**changes))


@pytest.mark.parametrize("changes,error,message", [*QUERIES, *TABLES])
def test_decomposed_rel_pos(changes: dict, error: type[Exception], message: str):
    arguments = good(**changes)
    del arguments["attn"]
    with pytest.raises(error, match=message):
        relpos_cuda.decomposed_rel_pos(**arguments)


@pytest.mark.parametrize(
    "q_size,k_size,table,error,message",
    [
        (0, 4, torch.zeros(7, 8), ValueError, "q_size must be at least 1, got 0"),
        (4, -1, torch.zeros(7, 8), ValueError, "k_size must be at least 1, got -1"),
        (4.5, 4, torch.zeros(7, 8), TypeError, "q_size must be an int, got 4.5"),
        (4, 4, torch.zeros(7), ValueError, r"rel_pos must be \[L, D\], got \[7\]"),
        (4, 4, torch.zeros(0, 8), ValueError, r"rel_pos must be \[L, D\], got \[0, 8\]"),
        (4, 4, torch.zeros(7, 8, dtype=torch.long), TypeError, "rel_pos must be floating point, got torch.int64"),
    ],
)
def test_get_rel_pos(q_size, k_size, table, error, message):
    with pytest.raises(error, match=message):
        relpos_cuda.get_rel_pos(q_size, k_size, table)


def good_attention(**changes) -> dict:
    arguments = good()
    del arguments["attn"]
    return arguments | {"k": torch.zeros(2, 3, 20, 8), "v": torch.zeros(2, 3, 20, 8)} | changes


KEYS = [
    ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    ({"v": 1.0}, TypeError, "v must be a tensor, got float"),
    ({"k": torch.zeros(2, 3, 20, 9)}, ValueError, r"k must be \[2, 3, 20, 8\] to go with q.*got \[2, 3, 20, 9\]"),
    ({"v": torch.zeros(2, 3, 19, 8)}, ValueError, r"v must be \[2, 3, 20, 8\].*got \[2, 3, 19, 8\]"),
    ({"v": torch.zeros(6, 20, 8)}, ValueError, r"v must be \[2, 3, 20, 8\].*got \[6, 20, 8\]"),
    ({"k": torch.zeros(2, 1, 20, 8)}, ValueError, r"k must be .*got \[2, 1, 20, 8\]"),
    ({"k": torch.zeros(2, 3, 20, 8).half()}, TypeError, r"k must be torch.float32 like q, got torch.float16"),
    ({"v": torch.zeros(2, 3, 20, 8).long()}, TypeError, r"v must be torch.float32 like q, got torch.int64"),
    ({"v": torch.zeros(2, 3, 20, 8, device="meta")}, ValueError, r"v must be on cpu like q, got meta"),
    ({"k_size": (5, 5)}, ValueError, r"k must be \[2, 3, 25, 8\] to go with q and k_size, got \[2, 3, 20, 8\]"),
]
SCALES = [
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": "0.5"}, TypeError, "scale must be a float or None, got '0.5'"),
    ({"scale": True}, TypeError, "scale must be a float or None, got True"),
    ({"scale": torch.tensor(0.5)}, TypeError, r"scale must be a float or None, got tensor\(0.5000\)"),
]


@pytest.mark.parametrize(
    "changes,error,message", [*QUERIES, *TABLES, *(s for s in SIZES if "attn" not in s[2]), *KEYS, *SCALES]
)
def test_rel_pos_attention(changes: dict, error: type[Exception], message: str):
    relpos_cuda.rel_pos_attention(**good_attention())
    with pytest.raises(error, match=message):
        relpos_cuda.rel_pos_attention(**good_attention(**changes))


def test_mixed_dtypes_under_autocast():
    """Where scaled_dot_product_attention rounds all three, so do we; integers and float64 stay errors."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            relpos_cuda.rel_pos_attention(**good_attention(k=torch.zeros(2, 3, 20, 8).half())).dtype == torch.bfloat16
        )
        with pytest.raises(TypeError, match="v must be torch.bfloat16 like q, got torch.int64"):
            relpos_cuda.rel_pos_attention(**good_attention(v=torch.zeros(2, 3, 20, 8).long()))
        with pytest.raises(TypeError, match="k must be torch.bfloat16 like q, got torch.float64"):
            relpos_cuda.rel_pos_attention(**good_attention(k=torch.zeros(2, 3, 20, 8).double()))


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"op": "bias"}, ValueError, 'op must be "logits" or "attention", got \'bias\''),
        ({"q": torch.zeros(1, 4, 8).long()}, TypeError, "q must be float16.*got torch.int64"),
        ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
        ({"q_size": (2, 3)}, ValueError, r"q must have S = 2 \* 3 = 6 tokens, got 4"),
        ({"q_size": (4,)}, ValueError, r"q_size must be \(h, w\) or \(t, h, w\), got \(4,\)"),
        ({"k_size": (1, 2, 2)}, ValueError, r"k_size must be \(h, w\) or .*, as q_size is, got \(1, 2, 2\)"),
        ({"k_size": (2, 0)}, ValueError, r"k_size\[1\] must be at least 1, got 0"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be at least 0, got -1"),
        ({"scale": "1"}, TypeError, "scale must be a float or None, got '1'"),
    ],
)
def test_is_supported(changes: dict, error: type[Exception], message: str):
    good = {"q": torch.zeros(1, 4, 8), "q_size": (2, 2), "k_size": (2, 2)}
    assert relpos_cuda.is_supported(**good) is None
    with pytest.raises(error, match=message):
        relpos_cuda.is_supported(**(good | changes))


def test_in_place_on_a_leaf_is_refused_as_everywhere():
    leaf = torch.zeros(2, 3, 20, 20, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        relpos_cuda.add_decomposed_rel_pos(**good(attn=leaf), inplace=True)


def test_second_derivatives_are_refused():
    q = torch.randn(2, 3, 20, 8, requires_grad=True)
    out = relpos_cuda.add_decomposed_rel_pos(**good(q=q, rel_pos_h=torch.randn(7, 8)))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    out = relpos_cuda.rel_pos_attention(**good_attention(q=q))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- direct callers of the ops get errors, never a wrong read


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
