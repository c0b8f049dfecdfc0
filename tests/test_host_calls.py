"""What the host does for a call: on a GPU, small layers wait for it. Counted; time is another on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import relpos_cuda
from problems import call, call_attention, draw, draw_attention, same

PROBLEM = same("small", 2, 2, 8)
RESIZED = same("resized", 2, 2, 8, table=7)


def calls_of(function: Callable[[], Any]) -> list[str]:
    """Names of all functions that this calls, in Python and from Python, when nothing is new to it."""
    names = []

    def note(frame: Any, event: str, of: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)
        elif event == "c_call":
            names.append(getattr(of, "__name__", str(of)))

    function()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


def test_attention(real_device: str):
    inputs = draw_attention(PROBLEM, torch.float32).leaves(torch.float32, real_device)

    def forward() -> torch.Tensor:
        return call_attention(relpos_cuda.rel_pos_attention, PROBLEM, inputs)

    with torch.no_grad():
        calls = calls_of(forward)
    assert "apply" not in calls, "nothing is to be saved, so autograd need not be asked"
    assert len(calls) <= 140, calls
    assert forward().grad_fn.name() == "AttentionFunctionBackward"
    calls = calls_of(forward)
    assert "apply" in calls
    assert len(calls) <= 180, calls
    if real_device == "cpu":  # elsewhere it has a thread of its own
        grad = torch.ones_like(forward())
        calls = calls_of(lambda: torch.autograd.backward(forward(), grad))
        assert len(calls) <= 290, calls


def test_the_backward_makes_no_zeros(real_device: str):
    """Each would be a kernel of its own, as for a gradient of the log-sum-exp."""
    inputs = draw_attention(PROBLEM, torch.float32).leaves(torch.float32, real_device)
    out = call_attention(relpos_cuda.rel_pos_attention, PROBLEM, inputs)
    grad = torch.ones_like(out)
    with torch.profiler.profile() as prof:
        torch.autograd.grad(out, inputs, grad)
    names = {event.name for event in prof.events()}
    assert names >= {"relpos_cuda::attention_bwd"} and not names & {"aten::zeros", "aten::zero_", "aten::fill_"}, names


def test_resized_tables(real_device: str):
    """Their Function, too, is applied without binding names: that alone would be twice a hundred calls."""
    inputs = draw_attention(RESIZED, torch.float32).leaves(torch.float32, real_device)
    calls = calls_of(lambda: call_attention(relpos_cuda.rel_pos_attention, RESIZED, inputs))
    assert calls.count("apply") >= 3 and "bind_default_args" not in calls, calls


def test_logits(real_device: str):
    attn, q, *tables = draw(PROBLEM, torch.float32).leaves(torch.float32, real_device)
    calls = calls_of(lambda: call(relpos_cuda.add_decomposed_rel_pos, PROBLEM, attn, q, tables))
    assert len(calls) <= 160, calls
