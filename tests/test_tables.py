"""The index rule and the tables: exactly what the libraries compute, whatever the ambient dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import relpos_cuda
from relpos_cuda import tables

SHIPPED = [(78, 10), (39, 20), (39, 10), (20, 20), (10, 20), (56, 14), (14, 28), (7, 14), (64, 64), (130, 130)]


def index_of_segment_anything(q: int, k: int) -> torch.Tensor:
    """The rule as libraries state it, in the default dtype of their users."""
    q_coords = torch.arange(q)[:, None] * max(k / q, 1.0)
    k_coords = torch.arange(k)[None, :] * max(q / k, 1.0)
    return ((q_coords - k_coords) + (k - 1) * max(q / k, 1.0)).long()


@pytest.mark.parametrize("q,k", [*SHIPPED, *[(a, b) for a in range(1, 40, 3) for b in range(1, 40, 2)]])
def test_index_equals_the_libraries(q: int, k: int):
    assert torch.equal(tables.index(q, k), index_of_segment_anything(q, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_index_ignores_the_default_dtype(dtype: torch.dtype):
    expected = [tables.index(q, k) for q, k in SHIPPED]
    torch.set_default_dtype(dtype)
    try:
        got = [tables.index(q, k) for q, k in SHIPPED]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_every_index_names_a_row():
    for q in range(1, 130):
        for k in range(1, 130):
            index = tables.index(q, k)
            assert 0 <= index.min() and index.max() < tables.rows_of(q, k), (q, k)


def test_lookup_inverse_names_the_key_of_every_row():
    q_size, k_size = (5, 7, 9), (2, 14, 4)
    values = tables.host_lookup(q_size, k_size).values.long()
    forward, start, first_row = [], 0, 0
    for q, k in zip(q_size, k_size, strict=True):
        forward.append(values[start : start + q * k].view(q, k))
        start += q * k
    for (q, k), index in zip(zip(q_size, k_size, strict=True), forward, strict=True):
        rows = tables.rows_of(q, k)
        inverse = values[start : start + q * rows].view(q, rows)
        assert torch.equal(inverse.gather(1, index - first_row), torch.arange(k).expand(q, k))
        assert ((inverse >= 0).sum(1) == k).all()
        start, first_row = start + q * rows, first_row + rows
    assert start == len(values)


def test_the_one_known_pair_that_shares_a_row_is_noticed():
    assert tables.one_to_one((64, 64), (64, 64))
    assert tables.one_to_one((78, 39), (10, 20))
    assert not tables.one_to_one((99, 4), (117, 4))


def test_lookup_is_cached_on_the_device():
    first = tables.lookup((3, 4), (3, 4), torch.device("cpu"))
    assert tables.lookup((3, 4), (3, 4), torch.device("cpu")) is first


def test_resize_keeps_a_table_of_the_right_length():
    table = torch.randn(27, 8)
    assert tables.resize(table, 27) is table


@pytest.mark.parametrize("rows", [5, 13, 63, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resize_is_linear_interpolation(rows: int, dtype: torch.dtype):
    table = torch.randn(27, 8, dtype=torch.float64).to(dtype)
    want = F.interpolate(table.reshape(1, 27, -1).permute(0, 2, 1), size=rows, mode="linear")
    assert torch.equal(tables.resize(table, rows), want.reshape(-1, rows).permute(1, 0))


@pytest.mark.parametrize("rows", [5, 40])
def test_gradient_of_a_resized_table(rows: int):
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, 4, dtype=torch.float64)
    want = torch.autograd.grad(F.interpolate(table.t()[None], size=rows, mode="linear")[0].t(), table, grad)
    torch.testing.assert_close(torch.autograd.grad(tables.resize(table, rows), table, grad), want)
    assert torch.autograd.gradgradcheck(lambda t: tables.resize(t, rows), table)


@pytest.mark.parametrize("video", [False, True])
def test_decomposed_rel_pos_by_hand(video: bool):
    q_size, k_size = ((2, 3, 4), (1, 3, 2)) if video else ((3, 4), (3, 2))
    heads, head_dim = 2, 5
    q = torch.randn(1, heads, torch.Size(q_size).numel(), head_dim, dtype=torch.float64)
    named = [torch.randn(tables.rows_of(a, b), head_dim).double() for a, b in zip(q_size, k_size, strict=True)]
    *t, h, w = named
    factors = relpos_cuda.decomposed_rel_pos(q, h, w, q_size, k_size, rel_pos_t=t[0] if video else None)
    order = [1, 2, 0] if video else [0, 1]
    for factor, axis in zip(factors, order, strict=True):
        rows = relpos_cuda.get_rel_pos(q_size[axis], k_size[axis], named[axis])
        for m, coordinates in enumerate(torch.cartesian_prod(*map(torch.arange, q_size)).tolist()):
            want = q[0, :, m] @ rows[coordinates[axis]].T
            torch.testing.assert_close(factor[0, :, m], want)
