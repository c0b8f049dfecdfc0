"""Tables of learned vectors: which row a pair of coordinates uses, and how a table is resized.

The index rule is the one all libraries share (segment_anything's order of operations), evaluated on the host in
float32: for sizes without an integer ratio, other precisions select other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._apply import apply

Grid = tuple[int, ...]  # (h, w) or (t, h, w)


def rows_of(q: int, k: int) -> int:
    """Rows a table needs for ``q`` query and ``k`` key coordinates: one per offset on the finer grid."""
    return 2 * max(q, k) - 1


def index(q: int, k: int) -> Tensor:
    """Row of the table for every pair of coordinates, ``[q, k]`` int64 on the CPU."""
    with torch.inference_mode(False), _disable_current_modes():
        queries = torch.arange(q, dtype=torch.float32, device="cpu")[:, None] * max(k / q, 1.0)
        keys = torch.arange(k, dtype=torch.float32, device="cpu")[None, :] * max(q / k, 1.0)
        return ((queries - keys) + (k - 1) * max(q / k, 1.0)).long()


class Lookup(NamedTuple):
    """The ``index`` argument of the ops (csrc/shapes.h), on the host."""

    values: Tensor  # int32: rows of all axes, then their inverses
    one_to_one: bool  # no two keys of a query share a row: what the CUDA kernels need


@functools.lru_cache(maxsize=256)
def host_lookup(q_size: Grid, k_size: Grid) -> Lookup:
    """Both directions of the index for all axes, the tables being stacked in the order of the axes."""
    forward: list[Tensor] = []
    inverse: list[Tensor] = []
    first_row = 0
    one_to_one = True
    with torch.inference_mode(False), _disable_current_modes():
        for q, k in zip(q_size, k_size, strict=True):
            rows = rows_of(q, k)
            axis = index(q, k)
            back = torch.full((q, rows), -1, dtype=torch.int64, device="cpu")
            back.scatter_(1, axis, torch.arange(k, device="cpu").expand(q, k))
            one_to_one &= bool(((back >= 0).sum(1) == k).all())
            forward.append((axis + first_row).flatten())
            inverse.append(back.flatten())
            first_row += rows
        return Lookup(torch.cat(forward + inverse).int(), one_to_one)


@functools.lru_cache(maxsize=256)
def _device_lookup(q_size: Grid, k_size: Grid, device: torch.device) -> Tensor:
    with torch.inference_mode(False), _disable_current_modes():
        return host_lookup(q_size, k_size).values.to(device)


def lookup(q_size: Grid, k_size: Grid, device: torch.device) -> Tensor:
    """The ``index`` argument of the ops, int32 on ``device``; cached, so that nothing syncs after the first call."""
    return _CONSTANTS[_slot(q_size, k_size)](q_size, k_size, device)


@functools.lru_cache(maxsize=256)
def one_to_one(q_size: Grid, k_size: Grid) -> bool:
    """Whether no two keys of a query share a table row."""
    return host_lookup(q_size, k_size).one_to_one


# ---- for torch.compile the index is a constant. It names one after the code that returned it, and refuses two of one
# name in a graph: so there are many functions, and no two pairs of grids of a process share one, up to a thousand.


def _marked_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.assume_constant_result does, which would import dynamo now."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _constant(number: int) -> Callable[[Grid, Grid, torch.device], Tensor]:
    def of_grids(q_size: Grid, k_size: Grid, device: torch.device) -> Tensor:
        if torch._C._len_torch_dispatch_stack():  # being traced: a constant of the graph, never a cached fake
            return torch.tensor(host_lookup(q_size, k_size).values.tolist(), dtype=torch.int32, device=device)
        return _device_lookup(q_size, k_size, device)

    of_grids.__code__ = of_grids.__code__.replace(co_name=f"lookup_{number}")
    return _marked_constant(of_grids)


_CONSTANTS = tuple(map(_constant, range(1024)))
_SLOTS: dict[tuple[Grid, Grid], int] = {}


@_marked_constant
def _slot(q_size: Grid, k_size: Grid) -> int:
    return _SLOTS.setdefault((q_size, k_size), len(_SLOTS) % len(_CONSTANTS))


def resize(table: Tensor, rows: int) -> Tensor:
    """``table`` linearly interpolated to ``rows`` rows (align_corners=False); itself if it has them already."""
    return table if table.shape[0] == rows else apply(_Resize, table, rows)


def _interpolate(table: Tensor, rows: int) -> Tensor:
    return F.interpolate(table.t()[None], size=rows, mode="linear")[0].t()


class _Resize(torch.autograd.Function):
    """Linear, so its gradient is a product with its own matrix: deterministic, which PyTorch's own is not on a GPU."""

    @staticmethod
    def forward(table: Tensor, rows: int) -> Tensor:
        return _interpolate(table, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        table, ctx.rows = inputs
        ctx.length, ctx.dtype = table.shape[0], table.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        identity = torch.eye(ctx.length, dtype=wide, device=grad.device)
        return (_interpolate(identity, ctx.rows).t() @ grad.to(wide)).to(ctx.dtype), None


def stack(tables: list[Tensor], q_size: Grid, k_size: Grid) -> Tensor:
    """The ``table`` argument of the ops: every axis' table resized, one after another, ``[rows, D]``."""
    resized = [resize(t, rows_of(q, k)) for t, q, k in zip(tables, q_size, k_size, strict=True)]
    return torch.cat(resized)
