"""The least that each pass must do, and so the least time it can take on a machine of given rates."""

from __future__ import annotations

from .cases import DTYPES, Case


def work(op: str, case: Case, dtype: str, direction: str) -> dict[str, int]:
    """Arithmetic of products, two per multiplication and addition; bytes to and from memory, each tensor once."""
    forward, backward = _WORK[op](case, DTYPES[dtype].itemsize)
    parts = {"forward": (forward,), "backward": (backward,)}.get(direction, (forward, backward))
    return {"flops": sum(p[0] for p in parts), "bytes": sum(p[1] for p in parts)}


def floor_milliseconds(flops: int, bytes: int, gflops: float, gbytes: float) -> float:
    """Arithmetic and traffic at once, each at the rate measured on the same machine."""
    return max(flops / gflops, bytes / gbytes) / 1e6


def _attention(case: Case, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    product = 2 * case.groups * case.rows * case.columns * case.head_dim
    queries, keys = (case.groups * n * case.head_dim * size for n in (case.rows, case.columns))
    forward = 2 * product + _factors(case), 2 * queries + 2 * keys  # q, out; k, v
    return forward, (5 * product + 3 * _factors(case), 4 * queries + 4 * keys)  # + grad, dq; dk, dv


def _logits(case: Case, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    scores, queries = (case.groups * case.rows * n * size for n in (case.columns, case.head_dim))
    return (_factors(case), 2 * scores + queries), (2 * _factors(case), scores + 2 * queries)


def _factors(case: Case) -> int:
    return 2 * case.groups * case.rows * sum(case.k_size) * case.head_dim


_WORK = {"attention": _attention, "logits": _logits}
