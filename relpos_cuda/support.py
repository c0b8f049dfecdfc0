"""Which problems the native kernels take; the rest goes to the PyTorch path, on CPUs and GPUs with a warning: why."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _checks, _loader, _ops, tables

_SCALES = 1 / 512, 512  # that CUDA kernels of the attention take: csrc/plan_attention.h


def is_supported(
    q: Tensor,
    q_size: tables.Grid,
    k_size: tables.Grid,
    *,
    num_prefix_tokens: int = 0,
    op: str = "logits",
    scale: float | None = None,
) -> str | None:
    """Whether a public function runs its fused kernels on this problem.

    Args:
        q: Queries as for the op, ``[B, heads, S, D]`` or ``[B * heads, S, D]``, of any floating dtype, on any device;
            only shape, dtype and device are read.
        q_size, k_size: Grids, both ``(h, w)`` or both ``(t, h, w)``.
        num_prefix_tokens: Class tokens in front of both grids.
        op: ``"logits"`` for :func:`relpos_cuda.add_decomposed_rel_pos`, ``"attention"`` for
            :func:`relpos_cuda.rel_pos_attention`.
        scale: Of the attention. Default ``D ** -0.5``.

    Returns:
        None if a fused kernel takes it; otherwise the reason why the slower PyTorch path will be used.

    Raises:
        ValueError: there is no such ``op``, shapes and sizes do not fit together, or ``scale`` is not finite.
        TypeError: ``q`` is no tensor or not of a floating dtype, a size is not an int, or ``scale`` is not a number.

    Source: the planner that the kernels ask, too (csrc/plan.h, csrc/plan_attention.h).
    """
    if op not in ("logits", "attention"):
        raise ValueError(f'op must be "logits" or "attention", got {op!r}')
    q_grid = _checks.check_grid("q_size", q_size, (2, 3), "(h, w) or (t, h, w)")
    k_grid = _checks.check_grid("k_size", k_size, (len(q_grid),), "(h, w) or (t, h, w), as q_size is")
    prefix = _checks.check_size("num_prefix_tokens", num_prefix_tokens, least=0)
    _checks.check_tokens(q, q_grid, prefix)
    return _reason(q, q_grid, k_grid, prefix, op, _checks.check_scale(scale, q.shape[-1]))


def _reason(
    q: Tensor, q_size: tables.Grid, k_size: tables.Grid, num_prefix_tokens: int, op: str, scale: float | None
) -> str | None:
    """As above, of a problem that has been checked."""
    head_dim = operator.index(q.shape[-1])  # torch.compile: a symbolic size becomes a constant
    scale = head_dim**-0.5 if scale is None else scale
    if torch.compiler.is_compiling():  # its value may be symbolic: only the question is a constant
        scale = 1.0 if _SCALES[0] <= scale <= _SCALES[1] else 0.0
    return _constant(q.device, q.dtype, tuple(q_size), tuple(k_size), head_dim, num_prefix_tokens, op, scale)


def _constant(*problem: Any) -> str | None:
    return refusal(*problem)


# For torch.compile: evaluated while tracing, not traced (which it would be if it were cached itself).
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def refusal(
    device: torch.device,
    dtype: torch.dtype,
    q_size: tables.Grid,
    k_size: tables.Grid,
    head_dim: int,
    num_prefix_tokens: int,
    op: str,
    scale: float,
) -> str | None:
    """The reason, from plain values."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for {device.type} tensors"
    if device.type == "cpu":
        return _without_kernels("cpu", op)
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float64:
        return "float64 has no CUDA kernel"
    planner = _loader.plan()
    if planner is None:
        return "the planner is not built"
    problem = (name, 1, q_size, k_size, head_dim, num_prefix_tokens, _arch(device))
    if op == "logits":
        plans = [planner.plan_logits(way, *problem) for way in ("forward", "backward")]
    else:
        kernels = ("forward", "backward_queries", "backward_keys")
        plans = [planner.plan_attention(kernel, *problem, scale) for kernel in kernels]
    for plan in plans:
        if plan.refusal:
            return str(plan.refusal)
    if not tables.one_to_one(q_size, k_size):
        return f"two keys share a table row for q_size={q_size}, k_size={k_size}"
    return _without_kernels("cuda", op) if torch.cuda.is_available() else None


def backward_in_one_pass(q: Tensor, q_size: tables.Grid, k_size: tables.Grid, num_prefix_tokens: int) -> bool:
    """Whether one CUDA kernel makes all gradients of the attention, without a cache of the factors."""
    return _constant_one_pass(
        q.device, q.dtype, tuple(q_size), tuple(k_size), operator.index(q.shape[-1]), num_prefix_tokens
    )


def _constant_one_pass(device: torch.device, *problem: Any) -> bool:
    return _one_pass(_arch(device), *problem)


_constant_one_pass._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _one_pass(arch: int, dtype: torch.dtype, *problem: Any) -> bool:
    planner = _loader.plan()
    name = str(dtype).removeprefix("torch.")
    return planner is not None and not planner.plan_attention("backward_window", name, 1, *problem, arch, 1.0).refusal


def _without_kernels(kind: str, op: str) -> str | None:
    if not _loader.load(kind):
        return f"the {kind.upper()} library is not usable: {_loader.status()[kind].reason}"
    return None if _ops.has_kernel(f"{op}_fwd", kind) else f"the {kind.upper()} library has no {op} kernel"


@functools.lru_cache(maxsize=64)
def _arch(device: torch.device) -> int:
    """Compute capability, 80 for a GPU that is only talked about; PyTorch takes its time to tell it."""
    if not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=64)
def warn_once(reason: str) -> None:
    warnings.warn(f"relpos_cuda: using the slower PyTorch path: {reason}", RuntimeWarning, stacklevel=2)


def fused(
    q: Tensor,
    q_size: tables.Grid,
    k_size: tables.Grid,
    num_prefix_tokens: int,
    op: str = "logits",
    scale: float | None = None,
) -> bool:
    """Whether to call the dispatcher op; it finds its own fallback on devices that have no kernels at all."""
    if q.device.type not in (("cuda",) if op == "logits" else ("cpu", "cuda")):
        return True  # without asking: on the CPU the logits op is a matter of microseconds
    reason = _reason(q, q_size, k_size, num_prefix_tokens, op, scale)
    if reason is None:
        return True
    explained = q.device.type == "cpu" and not _loader.load("cpu")  # by the loader
    if not torch.compiler.is_compiling() and not explained:
        warn_once(reason)
    return q.device.type == "cpu"
