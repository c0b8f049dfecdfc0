"""Right before fast: every peer against float64, on the shape that is timed.

The incoming gradient is zero for all but a few groups (heads of images), so that float64 needs to compute only these,
and still every gradient is compared, those of the tables too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .cases import Inputs
from .peers import Peer

WRONG = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}  # relative L2 error; TF32 passes
MOST_SCORES = 2 * 4096**2  # of all groups compared
Errors = dict[str, float]  # "out", "q", ...: relative L2 error


def groups_to_compare(x: Inputs) -> list[int]:
    """Spread over all of them: the first, the last, and what lies between."""
    count = max(2, min(x.case.groups, MOST_SCORES // (x.case.rows * x.case.columns)))
    return torch.linspace(0, x.case.groups - 1, count).round().int().unique().tolist()


def of_groups_only(x: Inputs, groups: list[int]) -> Inputs:
    """The same, with a gradient that is zero for all other groups; logits of its own, to be written into."""
    masked = torch.zeros_like(x.grad.flatten(0, 1))
    masked[groups] = x.grad.flatten(0, 1)[groups]
    attn = None if x.attn is None else x.attn.clone()
    return dataclasses.replace(x, grad=masked.unflatten(0, x.grad.shape[:2]), attn=attn)


def exact(op: Any, x: Inputs, groups: list[int]) -> dict[str, Tensor]:
    """Output and gradients of these groups, in float64."""
    leaves = {name: select(name, getattr(x, name), groups).detach().double().requires_grad_() for name in op.LEAVES}
    out = op.formula(x, **leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), select("out", x.grad, groups).double())
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def select(name: str, t: Tensor, groups: list[int]) -> Tensor:
    """``[groups, ...]``; tables belong to all groups."""
    return t if name.startswith("rel_pos") else t.flatten(0, 1)[groups]


def results(peer: Peer, x: Inputs, groups: list[int]) -> dict[str, Tensor]:
    """The same of a peer, in float64."""
    with peer.around():
        call = peer.on(of_groups_only(x, groups))
        if peer.gradients:
            out = call.forward()
            gradients = call.backward_of(out)
        else:
            with torch.no_grad():
                out, gradients = call.forward(), ()
    found = {"out": out.detach(), **dict(zip(peer.gradients, gradients, strict=True))}
    return {name: select(name, t, groups).double() for name, t in found.items()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    return {name: ((t - truth[name]).norm() / truth[name].norm()).item() for name, t in found.items()}


def is_wrong(of: Errors, dtype: torch.dtype) -> bool:
    """Also if anything is not a number."""
    return not all(error <= WRONG[dtype] for error in of.values())
