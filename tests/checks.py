"""The tolerance rule, once: float64 is the truth, the eager formula in the same dtype is the rival."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

import relpos_cuda
from problems import ATTENTION_NAMES, AttentionInputs, Problem, run_attention, vanishes
from relpos_cuda import reference

EVERYTHING = os.environ.get("RELPOS_TEST_EVERYTHING") == "1"  # `make test-all`


def miss(got: Tensor, exact: Tensor) -> float:
    """Largest absolute error; infinite where something is not finite."""
    if got.numel() == 0:
        return 0.0
    error = (got.detach().cpu().double() - exact.detach().cpu().double()).abs().max().item()
    return error if error == error else float("inf")


def assert_close_as_eager(got: Tensor, rival: Tensor, exact: Tensor, name: str) -> None:
    """At most twice the error of eager, plus one rounding of the largest value."""
    assert got.shape == exact.shape, f"{name} has shape {list(got.shape)}, not {list(exact.shape)}"
    assert got.dtype == rival.dtype, f"{name} is {got.dtype}, not {rival.dtype}"
    one_rounding = torch.finfo(got.dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
    allowed = 2 * miss(rival, exact) + one_rounding
    assert math.isfinite(allowed), f"{name} cannot be judged: eager, or the truth, is not finite"
    assert miss(got, exact) <= allowed, f"{name} is off by {miss(got, exact):.1e}, allowed {allowed:.1e}"


def assert_exact_as_float64(got: Tensor, exact: Tensor, name: str) -> None:
    """For float64, where eager is the truth itself: sums in another order, 64 roundings of the largest value."""
    allowed = 64 * torch.finfo(torch.float64).eps * max(exact.abs().max().item(), 1.0)
    assert miss(got, exact) <= allowed, f"{name} is off by {miss(got, exact):.1e}, allowed {allowed:.1e}"


def assert_vanishes(got: Tensor, exact: Tensor, all_exact: list[Tensor], name: str) -> None:
    """For a gradient that is exactly zero, or nearly: 64 roundings of the largest value that led to it."""
    allowed = 64 * torch.finfo(got.dtype).eps * max(t.abs().max().item() for t in all_exact)
    assert miss(got, exact) <= allowed, f"{name} is off by {miss(got, exact):.1e}, allowed {allowed:.1e}"


def cuda_kernels(call: Callable[[], object]) -> Counter[str]:
    """Names of what a GPU ran during the call, and how often."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return Counter({event.key: event.count for event in profile.key_averages()})


def compare_attention(
    problem: Problem, inputs: AttentionInputs, dtype: torch.dtype, device: str, **more: float
) -> None:
    """The output and every gradient of rel_pos_attention, against float64 and eager."""
    exact = run_attention(reference.rel_pos_attention, problem, inputs, torch.float64, **more)
    rival = run_attention(reference.rel_pos_attention, problem, inputs, dtype, device, **more)
    got = run_attention(relpos_cuda.rel_pos_attention, problem, inputs, dtype, device, **more)
    for name, g, r, e in zip(ATTENTION_NAMES, got, rival, exact, strict=False):
        if vanishes(problem, name):
            assert_vanishes(g, e, exact, name)
        else:
            assert_close_as_eager(g, r, e, name)
