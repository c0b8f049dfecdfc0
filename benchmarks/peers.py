"""What a peer is, and what the peers of both ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .cases import Grid, Inputs


@dataclass(frozen=True)
class Call:
    """One peer on one set of inputs: all that happens in here is timed."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad: Tensor

    def backward_of(self, out: Tensor, again: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad, retain_graph=again)


@dataclass(frozen=True)
class Peer:
    """A way to compute an op.

    Args:
        name: As tables show it.
        on: Makes its call for some inputs; what that does is not timed.
        gradients: Names of the leaves it has gradients for; none, if it has no backward or not all of them.
        note: What it does less than the others, if it does.
        around: A context that its calls run in.
    """

    name: str
    on: Callable[[Inputs], Call]
    gradients: tuple[str, ...]
    note: str = ""
    around: Callable[[], AbstractContextManager] = nullcontext

    @property
    def same_work(self) -> bool:
        return not self.note


Refusals = dict[str, str]  # peer: why it does not run


def factors(x: Inputs) -> tuple[Tensor, Tensor]:
    """rel_h, rel_w, ``[B, heads, S_q, k]``, as segment_anything makes them; zeros for class tokens.

    Libraries make the index anew in every call, on the CPU, which no CUDA graph captures. Here they have it.
    """
    grid = x.q[..., x.case.prefix :, :].unflatten(-2, x.case.q_size)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, x.rel_pos_h[x.index_h])
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, x.rel_pos_w[x.index_w])
    padding = (0, 0, x.case.prefix, 0)
    rel_h, rel_w = rel_h.flatten(2, 3), rel_w.flatten(2, 3)
    return (functional.pad(rel_h, padding), functional.pad(rel_w, padding)) if x.case.prefix else (rel_h, rel_w)


def on_grids(logits: Tensor, prefix: int, q_size: Grid, k_size: Grid) -> Tensor:
    """The part without class tokens, a view ``[B, heads, q_h, q_w, k_h, k_w]``."""
    return logits[..., prefix:, prefix:].unflatten(-1, k_size).unflatten(-3, q_size)


@contextmanager
def no_compiled_leftovers() -> Iterator[None]:
    """Compiled peers start anew with every shape, and do not generalise over those before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
