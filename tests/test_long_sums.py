"""Sums of thousands of float32 numbers, one after the other: each addition rounds, and what is lost adds up."""

from __future__ import annotations

import pytest
import torch

import relpos_cuda
from checks import compare_attention, miss
from conftest import use_device
from problems import NAMES, AttentionInputs, Problem, draw, draw_attention, run, run_attention
from relpos_cuda import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def many_keys() -> tuple[Problem, AttentionInputs]:
    """Of one weight, no power of two, for one key is ahead: as long as a sum is of one magnitude it rounds one way."""
    problem = Problem("many_keys", (2, 3), (112, 112), 16, heads=1)
    inputs = draw_attention(problem, torch.float32)
    q, k, v, *tables = inputs.tensors
    for t in (k, *tables):
        t.zero_()
    q.fill_(1), k[:, :, 0, 0].fill_(4)
    for t in (v, inputs.grad):
        t.abs_()
    return problem, inputs


def roundings(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, in roundings of the largest value."""
    return miss(got, exact) / (exact.abs().max().item() * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("way", ["cpu", "pytorch", "emulated", "cuda"])
def test_attention_to_many_keys(way: str, monkeypatch: pytest.MonkeyPatch):
    problem, inputs = many_keys()
    compare_attention(problem, inputs, torch.float32, use_device(way, monkeypatch))


@pytest.mark.parametrize("gpu", ["emulated", "cuda"])
def test_output_of_many_keys_on_a_gpu(gpu: str, monkeypatch: pytest.MonkeyPatch):
    """Eager is more exact there than on a CPU: it adds up parts. Without compensation, ours is off by 9 roundings."""
    problem, inputs = many_keys()
    exact = run_attention(reference.rel_pos_attention, problem, inputs, torch.float64)[0]
    device = use_device(gpu, monkeypatch)
    got = run_attention(relpos_cuda.rel_pos_attention, problem, inputs, torch.float32, device)[0]
    assert roundings(got, exact) <= 2


def test_table_gradient_of_many_queries_of_one_coordinate(device: str):
    """One by one, as eager's on a CPU, they are off by twelve roundings."""
    problem = Problem("many_queries", (1, 2048), (1, 4), 8, heads=1)
    inputs = draw(problem, torch.float32)
    inputs.grad.abs_(), inputs.q.abs_()
    of_table = NAMES.index("rel_pos_h")
    exact = run(reference.add_decomposed_rel_pos, problem, inputs, torch.float64)[of_table]
    got = run(relpos_cuda.add_decomposed_rel_pos, problem, inputs, torch.float32, device)[of_table]
    assert roundings(got, exact) <= 3
