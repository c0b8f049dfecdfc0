"""``python -m relpos_cuda check``: the ops of this machine against the formulas, by the rule of the tests."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import relpos_cuda

GRID, HEAD_DIM = (14, 14), 64
TOKENS = (2, 196, HEAD_DIM)
SHAPES = {
    "attn": (2, 196, 196),
    **dict.fromkeys(("q", "k", "v"), TOKENS),
    **dict.fromkeys(("rel_pos_h", "rel_pos_w"), (27, HEAD_DIM)),
}
# name of the function, its tensors: the first has the shape of the result
OPS = {
    "logits": ("add_decomposed_rel_pos", ("attn", "q", "rel_pos_h", "rel_pos_w")),
    "attention": ("rel_pos_attention", ("q", "k", "v", "rel_pos_h", "rel_pos_w")),
}


def check() -> int:
    """A line per device, op and dtype; 1 if one is wrong or has no kernels."""
    failed = False
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device, op, dtype in itertools.product(devices, OPS, (torch.float32, torch.bfloat16, torch.float16)):
        inputs = draw(op, device, dtype)
        native = relpos_cuda.is_supported(inputs["q"], GRID, GRID, op=op) is None
        wrong = wrong_results(op, inputs)
        path = "native kernels" if native else "PyTorch path"
        print(f"{device:5} {op:9} {str(dtype).removeprefix('torch.'):9} {path:15} {'; '.join(wrong) or 'ok'}")
        failed |= bool(wrong) or not native
    return int(failed)


def draw(op: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The bias is about as large as the logits."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(SHAPES[name], device=device, dtype=dtype) for name in OPS[op][1]}
    return {name: x * HEAD_DIM**-0.5 if name.startswith("rel_pos") else x for name, x in inputs.items()}


def wrong_results(op: str, inputs: dict[str, Tensor]) -> list[str]:
    """What is off, and by how much."""
    first = next(iter(inputs.values()))
    grad, dtype = torch.randn_like(first), first.dtype

    def run(module: object, to: torch.dtype) -> list[Tensor]:
        leaves = [x.to(to, copy=True).requires_grad_() for x in inputs.values()]
        out = getattr(module, OPS[op][0])(*leaves, GRID, GRID)
        return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(to)))]

    formula = relpos_cuda.reference
    runs = (run(relpos_cuda, dtype), run(formula, dtype), run(formula, torch.float64))
    names = ("out", *(f"d {name}" for name in inputs))
    complaints = (complaint(got, eager, exact, dtype) for got, eager, exact in zip(*runs, strict=True))
    return [f"{name} is {said}" for name, said in zip(names, complaints, strict=True) if said]


def complaint(got: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> str | None:
    """None within twice the error of the formula in the same dtype, plus one rounding; all given in float64."""
    error = (got - exact).abs().max().item()
    allowed = 2 * (eager - exact).abs().max().item() + torch.finfo(dtype).eps * exact.abs().max().item()
    return None if error <= allowed else f"off by {error:.1e}, allowed {allowed:.1e}"
