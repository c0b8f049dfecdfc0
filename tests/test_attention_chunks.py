"""rel_pos_attention in plain PyTorch: a chunk of query rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import relpos_cuda
from checks import compare_attention
from conftest import use_pytorch
from problems import Problem, call_attention, draw_attention, same
from relpos_cuda import _fallback, _fallback_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", ["one_row", "ragged_rows", "some_heads", "some_batch_elements"])
@pytest.mark.parametrize(
    "problem",
    [
        same("square", 3, 5, 16, batch=3, heads=5),
        Problem("class_tokens", (2, 3), (4, 6), 16, batch=2, heads=3, prefix=3),
        Problem("video_class", (2, 2, 3), (2, 2, 3), 16, batch=2, heads=3, prefix=1),
    ],
    ids=str,
)
def test_chunks(problem: Problem, budget: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Chunks end inside the class tokens, inside a row of the grid, between heads, between batch elements."""
    rows = {"one_row": 0.5, "ragged_rows": 5, "some_heads": 2 * problem.rows}
    fit = rows.get(budget, 2 * problem.heads * problem.rows)
    use_pytorch(monkeypatch)
    monkeypatch.setattr(_fallback, "CHUNK_BYTES", int(4 * problem.columns * fit))
    seen = []
    original = _fallback_attention._logits
    monkeypatch.setattr(
        _fallback_attention, "_logits", lambda q, *args: (seen.append(q.shape[:3].numel()), original(q, *args))[1]
    )
    compare_attention(problem, draw_attention(problem, dtype), dtype, "cpu")
    assert max(seen) == max(1, int(fit)) and sum(seen) == 2 * problem.batch * problem.heads * problem.rows


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_larger_than_a_chunk(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """4096 tokens: the logits of one head are 64 MiB. Not through the dispatcher, which hides an op's inside."""
    use_pytorch(monkeypatch)
    monkeypatch.setattr(_fallback, "CHUNK_BYTES", 8 << 20)
    problem = same("sam_global", 64, 64, 8, heads=1)
    leaves = draw_attention(problem, dtype).leaves(dtype)
    with LargestTensor() as largest:
        call_attention(relpos_cuda.rel_pos_attention, problem, leaves).sum().backward()
    assert largest.bytes == 8 << 20
