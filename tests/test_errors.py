"""Bad input: the argument, what was wanted, what was given, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    ({"q": torch.zeros(2, 3, 20, 8).to_sparse()}, TypeError, "q must be a dense tensor, got torch.sparse_coo"),
    ({"q": torch.zeros(2, 3, 20, 8).to_mkldnn()}, TypeError, "q must be a dense tensor, got torch._mkldnn"),
    ({"q": torch.nested.nested_tensor([torch.zeros(20, 8)])}, TypeError, "q must be a dense tensor, got a nested one"),
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
    ({"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
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
    arguments = good(attn=leaf, q=torch.ones(2, 3, 20, 8), rel_pos_h=torch.ones(7, 8))
    with pytest.raises(RuntimeError, match="attn must not be a leaf Variable"):
        relpos_cuda.add_decomposed_rel_pos(**arguments, inplace=True)
    assert not leaf.any(), "before anything is written"
    with torch.no_grad():
        assert relpos_cuda.add_decomposed_rel_pos(**arguments, inplace=True).data_ptr() == leaf.data_ptr()


OPS = {"add_decomposed_rel_pos": good, "rel_pos_attention": good_attention}


def penalty(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of the gradient."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    total = gradient.square().sum()
    total.backward()
    return x.grad


SECOND_DERIVATIVES = {
    "penalty": penalty,
    "hessian": torch.autograd.functional.hessian,
    "vhp": lambda loss, x: torch.autograd.functional.vhp(loss, x, x),
    "functorch": lambda loss, x: torch.func.grad(lambda y: torch.func.grad(loss)(y).square().sum())(x),
}


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
@pytest.mark.parametrize("of", ["q", "rel_pos_h"])
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused(op: str, of: str, way: str, nonlinear: bool):
    """Not found to be zero, which is what PyTorch makes of a backward that is not recorded."""
    arguments = {name: torch.randn_like(x) if isinstance(x, Tensor) else x for name, x in OPS[op]().items()}

    def loss(x: Tensor) -> Tensor:
        out = getattr(relpos_cuda, op)(**(arguments | {of: x}))
        return (out.square() if nonlinear else out.sin()).sum()

    torch.func.grad(loss)(arguments[of])  # the first is given
    with pytest.raises(RuntimeError, match="relpos_cuda: second derivatives are not supported"):
        SECOND_DERIVATIVES[way](loss, arguments[of])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("of", ["q", "rel_pos_w"])
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str, of: str, mode: Callable[[], AbstractContextManager]):
    """Tangents are not dropped, whatever is not recorded for the backward."""
    arguments = OPS[op]()
    with mode(), forward_ad.dual_level():
        arguments[of] = forward_ad.make_dual(arguments[of], torch.ones_like(arguments[of]))
        with pytest.raises(NotImplementedError, match="jvp"):
            getattr(relpos_cuda, op)(**arguments)


def test_gradients_that_are_recorded_are_the_same():
    arguments = {name: torch.randn_like(x) if isinstance(x, Tensor) else x for name, x in good_attention().items()}
    q = arguments["q"].requires_grad_()
    out = relpos_cuda.rel_pos_attention(**arguments).sin().sum()
    plain, recorded = (torch.autograd.grad(out, q, retain_graph=True, create_graph=create)[0] for create in (0, 1))
    assert torch.equal(plain, recorded) and recorded.requires_grad and not plain.requires_grad
