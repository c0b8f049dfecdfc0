"""Models of other libraries, accelerated against stock: outputs and every gradient, by the tolerance rule."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from checks import assert_exact_as_float64, assert_vanishes, miss
from relpos_cuda import functional
from relpos_cuda.integrations.adapters import class_of_forward

COMPARED: set[tuple[str, str, str]] = set()  # package, class, dtype of every comparison that has passed


def package_of(module: nn.Module) -> str:
    return class_of_forward(module).__module__.split(".")[0]


class OnGrid(nn.Module):
    """An attention that is told the size of its grid, with that size."""

    def __init__(self, attention: nn.Module, *size: int):
        super().__init__()
        self.attention, self.size = attention, size

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, self.size)


def filled(module: nn.Module, seed: int = 7) -> nn.Module:
    """Tables, and everything else that libraries start at zero or one, drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 1 or "pos" in name or "cls" in name or "token" in name:
                noise = torch.randn(p.shape, generator=draw) * (p.shape[-1] ** -0.5 if "rel_pos" in name else 0.1)
                p.copy_(p + noise if p.dim() == 1 else noise)
    return module


def first_tensor(out: Any) -> Tensor:
    """Of what models return: tensors, sequences, mappings."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "values"):
        out = list(out.values())
    return first_tensor(next(x for x in out if x is not None))


def run(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of the first input and every parameter that has one, under a fixed cotangent."""
    x, *others = inputs
    x = x.clone().requires_grad_(x.is_floating_point())
    out = first_tensor(module(x, *others))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    module.zero_grad()
    (out * weight).sum().backward()
    grads = {f"gradient of {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "gradient of the input": x.grad, **grads}


def compare(
    make: Callable[[], nn.Module],
    *inputs: Tensor,
    modules: int,
    fused: int | None = None,
    proven_in_float64: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> relpos_cuda.Report:
    """Stock and accelerated against stock in float64, all from the same numbers.

    In float64 every tensor is compared by itself, which proves the formula. In ``dtype`` precision is judged by the
    mean over all tensors, at most twice that of stock: a layer has gradients of a few numbers each, summed over all
    tokens, and which of two sums is nearer to the truth is luck.

    Args:
        make: The model, the same at every call; its tables filled.
        modules: How many attention modules must have our forward.
        fused: How often it must call the fused attention, if that is not once each.
        proven_in_float64: False for models that compute in float32 whatever they are given.
    """
    stock, ours = (make().to(dtype) for _ in range(2))
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    exact = run(copy.deepcopy(stock).double(), *(x.double() if x.is_floating_point() else x for x in inputs))
    stock, ours, inputs = stock.to(device), ours.to(device), tuple(x.to(device) for x in inputs)
    rival = run(stock, *inputs)
    report = relpos_cuda.accelerate(ours)
    assert len(report.replaced) == modules, report
    tables = [n for n, _ in ours.named_parameters() if "rel_pos_" in n]
    assert all(f"gradient of {n}" in exact for n in tables)
    with count_calls() as calls:
        got = run(ours, *inputs)
    assert calls == [modules if fused is None else fused], "the fused attention was not called by every module"
    assert exact.keys() == rival.keys() == got.keys()
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in exact.items()}
    if dtype == torch.float64:
        for name in exact:
            assert_exact_as_float64(got[name], exact[name], name)
    else:
        if proven_in_float64:
            compare(make, *(x.cpu() for x in inputs), modules=modules, fused=fused, dtype=torch.float64)
        assert_as_precise(got, rival, exact)
    if fused != 0:
        COMPARED.update((package_of(ours.get_submodule(f.name)), f.kind, str(dtype)[6:]) for f in report.replaced)
    assert relpos_cuda.restore(ours) == modules
    again = run(ours, *inputs)
    assert all(torch.equal(again[name], rival[name]) for name in rival), "restored, every bit is stock's"
    return report


def assert_stock_is_called(theirs: nn.Module, ours: nn.Module, *inputs: Tensor) -> None:
    """Bit by bit, dropout included; ``ours`` is accelerated."""
    torch.manual_seed(3)
    wanted = run(theirs, *inputs)
    torch.manual_seed(3)
    with count_calls() as calls:
        got = run(ours, *inputs)
    assert calls == [0]
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def assert_as_precise(got: dict[str, Tensor], rival: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """In the mean; and no tensor by itself far off."""
    names = [name for name in exact if not is_zero(exact[name], exact)]
    one_rounding = torch.finfo(got["output"].dtype).eps

    def relative(found: dict[str, Tensor]) -> dict[str, float]:
        return {name: miss(found[name], exact[name]) / exact[name].abs().max().item() for name in names}

    ours, theirs = relative(got), relative(rival)
    allowed = 2 * sum(theirs.values()) + len(names) * one_rounding
    assert sum(ours.values()) <= allowed, f"{sum(ours.values()):.1e} in all, allowed {allowed:.1e}: {ours}"
    for name in names:
        allowed = 8 * (theirs[name] + one_rounding)
        assert ours[name] <= allowed, f"{name} is off by {ours[name]:.1e}, allowed {allowed:.1e}"
    for name in exact.keys() - set(names):  # as the gradient of a bias of all keys
        assert_vanishes(got[name], exact[name], list(exact.values()), name)


def is_zero(gradient: Tensor, others: dict[str, Tensor]) -> bool:
    """Up to the roundings of float64."""
    largest = max(t.abs().max().item() for t in others.values())
    return gradient.abs().max().item() <= 64 * torch.finfo(torch.float64).eps * largest


@contextmanager
def count_calls() -> Iterator[list[int]]:
    """Of rel_pos_attention by any adapter."""
    calls = [0]
    original = functional.rel_pos_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(("relpos_cuda.integrations", "relpos_cuda.modules")) and hasattr(
                module, "rel_pos_attention"
            ):
                patch.setattr(module, "rel_pos_attention", counted)
        yield calls
