"""add_decomposed_rel_pos: values, every gradient, layouts."""

from __future__ import annotations

import random

import pytest
import torch

import relpos_cuda
from checks import assert_close_as_eager, assert_exact_as_float64, miss
from problems import MODELS, NAMES, TINY, Problem, call, draw, run, same
from relpos_cuda import autograd, reference

HALVES = [torch.bfloat16, torch.float16]
ours, eager = relpos_cuda.add_decomposed_rel_pos, reference.add_decomposed_rel_pos


def compare(problem: Problem, dtype: torch.dtype, device: str, attn_dtype: torch.dtype | None = None, **more) -> None:
    inputs = draw(problem, dtype, attn_dtype)
    exact = run(eager, problem, inputs, torch.float64)
    rival = run(eager, problem, inputs, dtype, device, attn_dtype)
    got = run(ours, problem, inputs, dtype, device, attn_dtype, **more)
    for name, g, r, e in zip(NAMES, got, rival, exact, strict=False):
        assert_close_as_eager(g, r, e, name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("problem", TINY, ids=str)
def test_tiny_problems(problem: Problem, dtype: torch.dtype, device: str):
    compare(problem, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", MODELS, ids=str)
def test_model_problems(problem: Problem, dtype: torch.dtype, real_device: str):
    compare(problem, dtype, real_device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("problem", TINY[::3], ids=str)
def test_float32_logits_of_half_queries(problem: Problem, dtype: torch.dtype, device: str):
    compare(problem, dtype, device, torch.float32)


def random_problem(seed: int) -> Problem:
    choose = random.Random(seed)
    axes = choose.choice([2, 2, 3])
    most = 9 if axes == 2 else 4
    sizes = [tuple(choose.randint(1, most) for _ in range(axes)) for _ in range(2)]
    return Problem(
        f"seed_{seed}",
        sizes[0],
        choose.choice([sizes[0], sizes[1]]),
        choose.choice([choose.randint(1, 40), 8 * choose.randint(1, 17)]),
        batch=choose.randint(1, 3),
        heads=choose.randint(1, 3),
        prefix=choose.choice([0, 0, 1, 3]),
        table=choose.choice([None, None, choose.randint(1, 30)]),
    )


@pytest.mark.parametrize("seed,dtype", [(n, [torch.float32, *HALVES][n % 3]) for n in range(30)], ids=str)
def test_random_problems(seed: int, dtype: torch.dtype, device: str):
    compare(random_problem(seed), dtype, device, inplace=seed % 2 == 1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_table_gradients_of_half_queries(dtype: torch.dtype, device: str):
    """float32 logits: the gradient of the factors must not be rounded to half precision on its way.

    Tensor cores multiply it in two parts: exact enough in float16, in bfloat16 to 16 bits.
    """
    problem = same("precise", 6, 8, 32, batch=2)
    inputs = draw(problem, dtype, torch.float32)
    exact, rival = (run(eager, problem, inputs, t)[3:] for t in (torch.float64, torch.float32))
    attn, q, *tables = inputs.leaves(torch.float32, device)
    out = call(ours, problem, attn, q.to(dtype), tables)
    got = torch.autograd.grad(out, tables, inputs.grad.to(device, torch.float32))
    for name, g, r, e in zip(NAMES[3:], got, rival, exact, strict=False):
        if dtype == torch.float16:
            assert_close_as_eager(g, r, e, name)
        else:
            assert miss(g, e) <= 2**-16 * e.abs().max(), name


def test_gradient_of_q_where_table_gradients_cancel(device: str):
    """Nearly the same factor gradients times rows of either sign: half of their digits would not be enough."""
    problem = same("cancelling", 4, 8, 32)
    inputs = draw(problem, torch.bfloat16, torch.float32)
    inputs.grad = 1 + inputs.grad / 64
    for table in inputs.tables:
        table[:] = 1
        table[::2] = -1
    exact = run(eager, problem, inputs, torch.float64)[2]
    got = run(ours, problem, inputs, torch.bfloat16, device, torch.float32)[2]
    assert miss(got, exact) <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("head_dim", [40, 96])
def test_table_gradients_of_more_queries_than_are_located_at_once(
    head_dim: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(autograd, "_TABLE_BLOCKS", 1)  # one block for all queries of a coordinate
    compare(Problem("many_queries", (2, 11), (2, 3), head_dim, batch=27), torch.bfloat16, device)


@pytest.mark.parametrize("problem", [TINY[0], TINY[5], TINY[14], TINY[20]], ids=str)
def test_in_place_equals_out_of_place(problem: Problem, device: str):
    inputs = draw(problem, torch.float32)
    results = [run(ours, problem, inputs, torch.float32, device, inplace=inplace) for inplace in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("problem", [*TINY, MODELS[0], MODELS[-1]], ids=str)
def test_float64(problem: Problem):
    inputs = draw(problem, torch.float64)
    exact = run(eager, problem, inputs, torch.float64)
    got = run(ours, problem, inputs, torch.float64)
    for name, g, e in zip(NAMES, got, exact, strict=False):
        assert_exact_as_float64(g, e, name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "problem", [Problem("small", (2, 3), (3, 2), 5, prefix=1), Problem("video", (2, 2, 1), (1, 2, 3), 3)], ids=str
)
def test_gradcheck(problem: Problem, inplace: bool):
    leaves = draw(problem, torch.float64).leaves(torch.float64, "cpu")

    def function(attn, q, *tables):
        return call(ours, problem, attn * 1, q, list(tables), inplace=inplace)

    assert torch.autograd.gradcheck(function, leaves)


# ---- layouts


def as_packed_qkv(q: torch.Tensor) -> torch.Tensor:
    """The same values as a view of a packed [B, S, 3, heads, D], as models produce it."""
    b, heads, s, d = q.shape
    packed = torch.randn(b, s, 3, heads, d).to(q)
    packed[:, :, 1] = q.transpose(1, 2)
    return packed.permute(2, 0, 3, 1, 4)[1]


def with_strided_last_axis(q: torch.Tensor) -> torch.Tensor:
    return q.mT.contiguous().mT


def with_odd_row_stride(q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(q, (1, 2))[..., 1:-2]


@pytest.mark.parametrize("layout", [as_packed_qkv, with_strided_last_axis, with_odd_row_stride])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_q(layout, dtype: torch.dtype, device: str):
    problem = same("strided", 5, 7, 16, batch=2, heads=3)  # the last block of rows is not full
    inputs = draw(problem, dtype)
    expected = run(ours, problem, inputs, dtype, device)
    attn, q, *tables = inputs.leaves(dtype, device)
    out = call(ours, problem, attn, layout(q), tables)
    grads = torch.autograd.grad(out, (attn, q, *tables), inputs.grad.to(device, dtype))
    for name, got, want in zip(NAMES, (out, *grads), expected, strict=False):
        assert torch.equal(got, want), name


def test_packed_q_is_not_copied(monkeypatch: pytest.MonkeyPatch):
    problem = same("packed", 4, 8, 16, batch=2, heads=3)
    attn, q, *tables = draw(problem, torch.float32).leaves(torch.float32, "cpu")
    packed = as_packed_qkv(q.detach())
    seen = []
    original = relpos_cuda._ops.logits_fwd
    monkeypatch.setattr(
        relpos_cuda._ops, "logits_fwd", lambda *args: (seen.append(args[2].data_ptr()), original(*args))
    )
    call(ours, problem, attn.detach(), packed, [t.detach() for t in tables])
    assert seen == [packed.data_ptr()]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "expanded"])
def test_strides_of_attn(layout: str, inplace: bool, device: str):
    problem = same("attn", 4, 5, 16, heads=3)
    inputs = draw(problem, torch.float32)
    expected = run(ours, problem, inputs, torch.float32, device)[0]
    _, q, *tables = inputs.leaves(torch.float32, device)
    attn = inputs.attn.to(device, torch.float32)
    if layout == "transposed":
        attn = attn.mT.contiguous().mT
    elif layout == "sliced":
        attn = torch.nn.functional.pad(attn, (0, 3))[..., :-3]
    elif layout == "misaligned":
        attn = torch.nn.functional.pad(attn.flatten(), (1, 0))[1:].view_as(attn)
    else:
        attn = attn[:, :1].expand_as(attn)
        if inplace:
            with pytest.raises(RuntimeError):  # one memory location per element, as for any in-place operation
                call(ours, problem, attn, q, tables, inplace=True)
            return
        expected = run(ours, problem, _with_attn(inputs, attn), torch.float32, device)[0]
    out = call(ours, problem, attn, q, tables, inplace=inplace)
    assert torch.equal(out, expected)
    assert (out is attn) == inplace


def _with_attn(inputs, attn: torch.Tensor):
    inputs.attn = attn.double().cpu().contiguous()
    return inputs


def test_three_and_four_dimensional_q_agree(device: str):
    problem = same("dims", 5, 6, 24, batch=2, heads=3)
    inputs = draw(problem, torch.float32)
    four = run(ours, problem, inputs, torch.float32, device)
    inputs.attn, inputs.q, inputs.grad = (t.flatten(0, 1) for t in (inputs.attn, inputs.q, inputs.grad))
    three = run(ours, problem, inputs, torch.float32, device)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(three, four, strict=True))


def test_attn_may_merge_batch_and_heads(device: str):
    problem = same("merged", 3, 4, 8, batch=2, heads=2)
    inputs = draw(problem, torch.float32)
    attn, q, *tables = (t.detach() for t in inputs.leaves(torch.float32, device))
    out = call(ours, problem, attn.flatten(0, 1), q, list(tables))
    assert torch.equal(out, call(ours, problem, attn, q, list(tables)).flatten(0, 1))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "misaligned"])
def test_gradient_of_any_layout(layout: str, device: str):
    problem = same("grad", 4, 5, 16)
    leaves = draw(problem, torch.float32).leaves(torch.float32, device)
    out = call(ours, problem, leaves[0], leaves[1], leaves[2:])
    ones = torch.ones_like(out)
    if layout == "expanded":
        grad = torch.ones((), device=device).expand_as(out)
    elif layout == "transposed":
        grad = ones.mT.contiguous().mT
    else:
        grad = torch.nn.functional.pad(ones.flatten(), (1, 0))[1:].view_as(ones)
    got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    want = torch.autograd.grad(out, leaves, ones)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradient_of_attn_passes_through_without_a_copy(device: str):
    problem = same("grad", 4, 5, 16)
    leaves = draw(problem, torch.float32).leaves(torch.float32, device)
    out = call(ours, problem, leaves[0], leaves[1], leaves[2:])
    grad = torch.randn_like(out)
    (d_attn,) = torch.autograd.grad(out, leaves[:1], grad)
    assert d_attn.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [1, 3], [0, 2], [2, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted: list[int], dtype: torch.dtype, device: str):
    problem = same("some", 4, 5, 16)
    inputs = draw(problem, dtype)
    every = run(ours, problem, inputs, dtype, device)[1:]
    leaves = [leaf.requires_grad_(i in wanted) for i, leaf in enumerate(inputs.leaves(dtype, device))]
    out = call(ours, problem, leaves[0], leaves[1], leaves[2:])
    got = torch.autograd.grad(out, [leaves[i] for i in wanted], inputs.grad.to(device, dtype))
    assert all(torch.equal(g, every[i]) for i, g in zip(wanted, got, strict=True))


# ---- what is not finite


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_stay_where_they_are(value: float, device: str):
    problem = same("inf", 4, 8, 16)
    attn, q, *tables = (t.detach() for t in draw(problem, torch.float32).leaves(torch.float32, device))
    attn[0, 1, 3, 5] = value
    out = call(ours, problem, attn, q, list(tables))
    assert torch.isfinite(out).sum() == out.numel() - 1
    assert not torch.isfinite(out[0, 1, 3, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["q", "grad"])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_a_row_that_is_not_finite_spoils_only_what_uses_it(which: str, head_dim: int, dtype: torch.dtype, device: str):
    """A kernel that pads its tiles with a row of q, times zero, or a row with the next, would spoil more."""
    problem = same("inf", 4, 8, head_dim)
    inputs = draw(problem, dtype)
    getattr(inputs, which)[:, :, 0] = float("inf")  # coordinates (0, 0): rows 0 .. K - 1
    out, *grads = run(ours, problem, inputs, dtype, device)
    assert torch.isfinite(out[:, :, which == "q" :]).all()
    for keys, d_table in zip(problem.k_size, grads[2:4], strict=True):
        finite = torch.isfinite(d_table).all(-1)
        assert finite.tolist() == [False] * keys + [True] * (keys - 1)
