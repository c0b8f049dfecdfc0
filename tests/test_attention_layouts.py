"""rel_pos_attention: wherever the numbers of its arguments lie."""

from __future__ import annotations

import pytest
import torch

import relpos_cuda
from problems import ATTENTION_NAMES, call_attention, draw_attention, packed, run_attention, same
from relpos_cuda import _ops

pytestmark = pytest.mark.usefixtures("one_thread")

ours = relpos_cuda.rel_pos_attention


def with_strided_last_axis(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*(t.mT.contiguous().mT for t in tensors[:3]), *tensors[3:]]


def with_odd_row_stride(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*(torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in tensors[:3]), *tensors[3:]]


def with_odd_start(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*(torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in tensors[:3]), *tensors[3:]]


@pytest.mark.parametrize("layout", [packed, with_strided_last_axis, with_odd_row_stride, with_odd_start])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(layout, dtype: torch.dtype, device: str):
    problem = same("strided", 4, 8, 16, batch=2, heads=3)
    inputs = draw_attention(problem, dtype)
    expected = run_attention(ours, problem, inputs, dtype, device)
    leaves = inputs.leaves(dtype, device)
    out = call_attention(ours, problem, layout(leaves))
    grads = torch.autograd.grad(out, leaves, inputs.grad.to(device, dtype))
    for name, got, want in zip(ATTENTION_NAMES, (out, *grads), expected, strict=False):
        torch.testing.assert_close(got, want, msg=name)


def test_packed_views_are_not_copied_and_heads_come_out_merged(monkeypatch: pytest.MonkeyPatch):
    problem = same("packed", 4, 8, 16, batch=2, heads=3)
    tensors = packed([t.detach() for t in draw_attention(problem, torch.float32).leaves(torch.float32)])
    seen = []
    original = _ops.attention_fwd
    monkeypatch.setattr(_ops, "attention_fwd", lambda *args: (seen.append(args[2:5]), original(*args)))
    out = call_attention(ours, problem, tensors)
    assert [t.data_ptr() for t in seen[0]] == [t.data_ptr() for t in tensors[:3]]
    merged = out.transpose(1, 2).flatten(2)
    assert out.shape == (2, 3, 32, 16) and merged.data_ptr() == out.data_ptr() and merged.is_contiguous()


def test_three_and_four_dimensional_q_agree(device: str):
    problem = same("dims", 5, 6, 24, batch=2, heads=3)
    inputs = draw_attention(problem, torch.float32)
    four = run_attention(ours, problem, inputs, torch.float32, device)
    inputs.tensors[:3] = [t.flatten(0, 1) for t in inputs.tensors[:3]]
    inputs.grad = inputs.grad.flatten(0, 1)
    three = run_attention(ours, problem, inputs, torch.float32, device)
    assert three[0].shape == (6, 30, 24) and three[0].is_contiguous()
    for name, a, b in zip(ATTENTION_NAMES, three, four, strict=False):
        torch.testing.assert_close(a, b.reshape(a.shape), msg=name)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradient_of_any_layout(layout: str, device: str):
    problem = same("grad", 4, 5, 16)
    leaves = draw_attention(problem, torch.float32).leaves(torch.float32, device)
    out = call_attention(ours, problem, leaves)
    ones = torch.ones_like(out)
    grad = ones[:1, :1, :1, :1].expand_as(out) if layout == "expanded" else ones.mT.contiguous().mT
    got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    want = torch.autograd.grad(out, leaves, ones)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
