"""The dispatcher ops: schemas and fakes here, kernels in the native libraries, loaded by the first call that needs one.

Outputs and work spaces are arguments, so that allocation, and a CUDA out-of-memory, stays PyTorch's. Schemas need no
compiler: tracing, export and meta tensors work on any machine.

    logits_fwd      out = attn + bias           in place of out if attn is None
    logits_bwd      dq, dtable = gradients      either may be None; dtable is float32 (float64 for float64 q)
    attention_fwd   out = softmax(scale * q k^T + bias) v     lse [G, M]: log of the sum of exponentials, or None
    attention_bwd   dq, dk, dv, dtable = gradients            any may be None

q, out and their gradients are [B, heads, M, D] or [G, M, D], k and v likewise with N tokens; of any strides, the last
axis contiguous, but for dq of logits_bwd, which is contiguous. lse has the dtype of dtable.

``table`` holds the rows of all axes, ``index`` says which row a pair of coordinates uses (csrc/shapes.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _fallback, _fallback_attention, _loader

_library = torch.library.Library("relpos_cuda", "DEF")

SCHEMAS = {
    "logits_fwd": "(Tensor(a!) out, Tensor? attn, Tensor q, Tensor table, Tensor index, "
    "int[] q_size, int[] k_size, int num_prefix_tokens) -> ()",
    "logits_bwd": "(Tensor(a!)? dq, Tensor(b!)? dtable, Tensor grad, Tensor q, Tensor table, Tensor index, "
    "Tensor(c!)? factors, Tensor(d!)? partials, int[] q_size, int[] k_size, int num_prefix_tokens) -> ()",
    "attention_fwd": "(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, Tensor table, Tensor index, "
    "int[] q_size, int[] k_size, int num_prefix_tokens, float scale) -> ()",
    "attention_bwd": "(Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dtable, Tensor grad, "
    "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor table, Tensor index, "
    "Tensor(e!)? factors, Tensor(f!)? partials, Tensor(g!)? columns, Tensor(h!)? lines, "
    "int[] q_size, int[] k_size, int num_prefix_tokens, float scale) -> ()",
}
_FALLBACKS: dict[str, Callable[..., None]] = {
    "logits_fwd": _fallback.logits_fwd,
    "logits_bwd": _fallback.logits_bwd,
    "attention_fwd": _fallback_attention.attention_fwd,
    "attention_bwd": _fallback_attention.attention_bwd,
}


def has_kernel(name: str, device: str) -> bool:
    """Whether a library loaded so far brought a kernel for ``"cpu"`` or ``"cuda"`` tensors: asks the dispatcher."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"relpos_cuda::{name}", device.upper())


def _first_call(name: str) -> Callable[..., None]:
    """Kernel of the lowest priority: it runs only while the device has no native one."""

    def load_and_run(*args: Any) -> None:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if device in ("cpu", "cuda") and _loader.load(device) and has_kernel(name, device):
            getattr(torch.ops.relpos_cuda, name).default(*args)  # finds the native kernel now
        else:
            _FALLBACKS[name](*args)

    return load_and_run


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    torch.library.register_fake(f"relpos_cuda::{_name}", lambda *args: None, lib=_library)
    _library.impl(_name, _first_call(_name), "CompositeExplicitAutograd")

logits_fwd = torch.ops.relpos_cuda.logits_fwd.default
logits_bwd = torch.ops.relpos_cuda.logits_bwd.default
attention_fwd = torch.ops.relpos_cuda.attention_fwd.default
attention_bwd = torch.ops.relpos_cuda.attention_bwd.default
