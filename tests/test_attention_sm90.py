"""The attention's kernels for sm_90, with TMA and wgmma: values, every gradient, and that they are what runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import emulator
import relpos_cuda
from checks import assert_close_as_eager, compare_attention, cuda_kernels
from conftest import use_device
from problems import (
    ATTENTION_NAMES,
    EXTREMES,
    AttentionInputs,
    Problem,
    call_attention,
    draw_attention,
    packed,
    run_attention,
    same,
)
from relpos_cuda import _env, support

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SMALL = [  # D up to 64 and no tile of 48: emulator.FEW_KERNELS
    same("line_of_33", 2, 33, 64, batch=2),
    same("round_the_stages", 9, 40, 8, heads=1),
    same("ragged_5x13", 5, 13, 48, batch=2),
    same("line_of_5", 7, 5, 16, batch=4, heads=3),
    same("interpolated", 5, 12, 40, table=27),
    Problem("two_blocks_of_queries", (8, 20), (2, 5), 32),
    Problem("lines_past_the_end", (3, 4), (5, 14), 56, batch=4),
    Problem("two_spans", (2, 5), (3, 76), 24, batch=2),
    Problem("video", (2, 3, 11), (3, 4, 11), 32),
    same("rows_that_no_box_fills", 5, 20, 16, batch=2),
    same("line_of_100", 3, 100, 40, heads=1),
    same("line_of_136", 2, 136, 8, heads=1),
    Problem("class_tokens", (5, 9), (4, 11), 32, batch=2, prefix=3),
    Problem("class_token_and_lines", (3, 8), (3, 40), 16, prefix=1),
]
LARGE = [
    same("line_of_64", 3, 64, 80, heads=1),
    same("line_of_48", 3, 48, 64, heads=1),
    same("sam_h_window", 14, 14, 80, heads=1),
    Problem("two_spans_of_40", (2, 5), (3, 76), 128, batch=2, heads=1),
    same("dim_128_line_of_64", 3, 64, 128, heads=1),
    same("dim_112_line_of_50", 3, 50, 112, heads=1),
    Problem("mvitv2", (9, 15), (7, 7), 96, heads=1),
    same("dim_112", 4, 24, 104, batch=2),
]
ours, eager = relpos_cuda.rel_pos_attention, relpos_cuda.reference.rel_pos_attention


@pytest.fixture(params=["emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(emulator.ARCH, "90")
    monkeypatch.setenv(_env.WGMMA.name, "1")
    monkeypatch.setattr(support, "backward_in_one_pass", lambda *_: False)  # windows, too
    monkeypatch.setenv("SIMT_PROXY", "1")  # where ThreadSanitizer watches, it sees the asynchronous proxy, too
    device = use_device(request.param, monkeypatch)
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is not of sm_90")
    return device


def kernels_by_warpgroups(device: str, call: Callable[[], object]) -> int:
    """How often kernels for sm_90 ran during the call; on the emulator, how many products of warpgroups there were."""
    if device == "cuda":
        return sum(count for name, count in cuda_kernels(call).items() if "sm90" in name)
    return emulator.count("wgmma", call)


def check(problem: Problem, inputs: AttentionInputs, dtype: torch.dtype, device: str) -> None:
    assert kernels_by_warpgroups(device, lambda: compare_attention(problem, inputs, dtype, device))


@HALVES
@pytest.mark.parametrize("problem", [*SMALL, *LARGE], ids=str)
def test_values_and_gradients(problem: Problem, dtype: torch.dtype, device: str):
    check(problem, draw_attention(problem, dtype), dtype, device)


@HALVES
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme: Callable[[AttentionInputs], None], dtype: torch.dtype, device: str):
    problem = same("extreme", 5, 11, 32, batch=2)
    inputs = draw_attention(problem, dtype)
    extreme(inputs)
    inputs.tensors = [t.to(dtype).double() for t in inputs.tensors]
    check(problem, inputs, dtype, device)


def three_dimensional(leaves: list[Tensor]) -> list[Tensor]:
    return [*(t.flatten(0, 1) for t in leaves[:3]), *leaves[3:]]


@pytest.mark.parametrize("layout", [packed, three_dimensional])
def test_layouts(layout: Callable[[list[Tensor]], list[Tensor]], device: str):
    problem = same("strided", 4, 9, 16, batch=2, heads=3)
    leaves = draw_attention(problem, torch.bfloat16).leaves(torch.bfloat16, device)
    want = call_attention(ours, problem, leaves)
    got = []
    assert kernels_by_warpgroups(device, lambda: got.append(call_attention(ours, problem, layout(leaves))))
    assert torch.equal(got[0].reshape(want.shape), want)


@pytest.mark.parametrize("where", ["keys of all groups", "class tokens", "float32", "not wanted"])
def test_what_the_other_kernel_does(where: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """Keys without a stride, which TMA does not take, among others."""
    prefix, dtype = int(where == "class tokens"), torch.float32 if where == "float32" else torch.bfloat16
    problem = Problem("other", (4, 6), (4, 6), 16, batch=2, heads=2, prefix=prefix)
    inputs = draw_attention(problem, dtype)
    tensors = [t.to(device, dtype) for t in inputs.tensors]
    if where == "keys of all groups":
        tensors[1:3] = [t[:1].expand_as(t) for t in tensors[1:3]]
    if where == "not wanted":
        monkeypatch.setenv(_env.WGMMA.name, "0")
    got: list[Tensor] = []
    assert not kernels_by_warpgroups(device, lambda: got.append(call_attention(ours, problem, tensors)))
    exact = call_attention(eager, problem, [t.cpu().double() for t in tensors])
    assert_close_as_eager(got[0], call_attention(eager, problem, [t.cpu() for t in tensors]), exact, "out")


@pytest.mark.parametrize("keys,wanted", [((5, 13), False), ((9, 40), True)], ids=["window", "more keys"])
def test_what_is_faster(keys: tuple[int, int], wanted: bool, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(_env.WGMMA.name)
    problem = same("some", *keys, 16, heads=1)
    leaves = draw_attention(problem, torch.bfloat16).leaves(torch.bfloat16, device)
    with torch.no_grad():
        assert wanted == bool(kernels_by_warpgroups(device, lambda: call_attention(ours, problem, leaves)))


def test_same_bits_whatever_comes_first(device: str, monkeypatch: pytest.MonkeyPatch):
    problem = same("some", 5, 40, 16, batch=2)
    inputs = draw_attention(problem, torch.bfloat16)
    first = run_attention(ours, problem, inputs, torch.bfloat16, device)
    for schedule in ("lifo", "random"):
        monkeypatch.setenv("SIMT_SCHED", schedule)
        again = run_attention(ours, problem, inputs, torch.bfloat16, device)
        for name, a, b in zip(ATTENTION_NAMES, first, again, strict=False):
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "problem,kernels",
    [
        (same("all", 3, 40, 16), (1, 1, 2)),
        (same("class_tokens", 3, 40, 16, prefix=1), (0, 0, 1)),  # they are no keys that TMA brings
        (same("long_lines", 1, 136, 16), (1, 1, 1)),  # of keys that stay
        (same("one_gradient_for_all_heads", 3, 40, 16), (1, 1, 1)),  # which TMA does not step along
    ],
    ids=str,
)
def test_which_kernels_run(problem: Problem, kernels: tuple[int, int, int], device: str):
    """Forward; backward of q alone; of k, too. Each has products of its own, so more kernels have more of them."""
    leaves = [t.detach() for t in draw_attention(problem, torch.bfloat16).leaves(torch.bfloat16, device)]

    def products(*wanted: int) -> tuple[int, int]:  # of both passes
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        out: list[Tensor] = []
        forward = kernels_by_warpgroups(device, lambda: out.append(call_attention(ours, problem, inputs)))
        grad = out[0].detach()
        if problem.name == "one_gradient_for_all_heads":
            grad = grad[:, :1].expand_as(grad)
        return forward, kernels_by_warpgroups(device, lambda: out[0].backward(grad))

    forward, of_q = products(0)
    _, of_both = products(0, 1)
    assert (min(forward, 1), min(of_q, 1), min(of_q, 1) + int(of_both > of_q)) == kernels
