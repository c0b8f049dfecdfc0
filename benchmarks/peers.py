"""What the benchmarks of both ops share: how a peer is made of a function, and the formula's factors by einsums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from relpos_cuda import reference
from relpos_cuda._self_check import complaint

from .cases import Case

Peer = Callable[[], object]
Peers = dict[str, Peer]  # "forward: name" or "forward + backward: name"


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def tables_of(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = [(2 * max(a, b) - 1, case.head_dim) for a, b in zip(case.q_size, case.k_size, strict=True)]
    tables = [normal(*shape, dtype=dtype, device=device) * case.head_dim**-0.5 for shape in shapes]
    return [table.requires_grad_() for table in tables]


def factors(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size, k_size) -> tuple[Tensor, Tensor]:
    """``rel_h[..., None] + rel_w[..., None, :]`` is the bias, [B, q_h, q_w, k_h, k_w]; as segment_anything makes it."""
    grid = q.reshape(-1, *q_size, q.shape[-1])
    rel_h = torch.einsum("bhwc,hkc->bhwk", grid, reference.get_rel_pos(q_size[0], k_size[0], rel_pos_h))
    rel_w = torch.einsum("bhwc,wkc->bhwk", grid, reference.get_rel_pos(q_size[1], k_size[1], rel_pos_w))
    return rel_h, rel_w


def without_gradients(function: Callable, *arguments, **more) -> Peer:
    def run():
        with torch.no_grad():
            function(*arguments, **more)

    return run


def by_pass(passes: dict[str, Peers]) -> Peers:
    return {f"{direction}: {name}": peer for direction, peers in passes.items() for name, peer in peers.items()}


def must_be_right(case: Case, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Right before fast: as ``python -m relpos_cuda check`` judges."""
    if wrong := complaint(ours.double(), eager.double(), exact, ours.dtype):
        raise SystemExit(f"{case}: wrong result, {wrong}")
