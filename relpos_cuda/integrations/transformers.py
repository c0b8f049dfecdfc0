"""SAM of transformers: vision attention on our ops.

"sdpa" models run on the fused attention, "eager" ones, which return their weights, on the logits op.

    patch(model)                 # every SamVisionAttention and SamVisionSdpaAttention in the model
    unpatch(model)               # as if nothing had happened
    with patched(model): ...     # both

Only ``forward`` of the module *instances* is replaced: classes, parameters, state_dict and hooks
stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import add_decomposed_rel_pos, rel_pos_attention


def patch(model: nn.Module) -> int:
    """Runs a SAM's vision attention on :func:`relpos_cuda.rel_pos_attention`.

    Models whose ``attn_implementation`` is "eager" return attention weights: theirs is
    :func:`relpos_cuda.add_decomposed_rel_pos`.

    Args:
        model: Any module with the vision attention of transformers' SAM: SamModel, SamVisionModel,
            one layer, the attention itself; ``attn_implementation`` "eager" or "sdpa"; any device
            and dtype.

    Returns:
        How many attention modules are patched now. A second call changes nothing.

    Raises:
        ImportError: transformers is not installed, or has no SAM.
        ValueError: ``model`` has no such module, or something else replaced the ``forward`` of one.
    """
    ours = _replacements()
    found = [(name, m) for name, m in model.named_modules() if type(m).forward in ours]
    if not found:
        raise ValueError(
            "model must contain SamVisionAttention or SamVisionSdpaAttention of transformers, "
            f"got {type(model).__name__} without any"
        )
    for name, module in found:
        current = getattr(module.forward, "__func__", None)
        if current is not type(module).forward and not _is_patched(module):
            raise ValueError(
                f"forward of {name or type(module).__name__} must be that of its class, "
                f"got {module.forward!r}: patch the model before other tools wrap it"
            )
    for _, module in found:
        if not _is_patched(module):
            module.forward = types.MethodType(ours[type(module).forward], module)
    return len(found)


def unpatch(model: nn.Module) -> int:
    """Gives every patched module the ``forward`` of its class back; returns how many there were."""
    modules = [module for module in model.modules() if _is_patched(module)]
    for module in modules:
        del module.forward
    return len(modules)


@contextmanager
def patched(model: nn.Module) -> Iterator[int]:
    """:func:`patch` for the length of a ``with`` block; what was patched before stays patched."""
    stay = {module for module in model.modules() if _is_patched(module)}
    number = patch(model)
    try:
        yield number
    finally:
        for module in model.modules():
            if module not in stay and _is_patched(module):
                del module.forward


def _replacements() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our forward for each of the library's; a subclass with a forward of its own is not ours."""
    try:
        from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention
    except ImportError as error:
        raise ImportError("patching SAM needs transformers 5: pip install 'transformers>=5'") from error
    return {
        SamVisionAttention.forward: _eager_forward,
        SamVisionSdpaAttention.forward: _sdpa_forward,
    }


def _is_patched(module: nn.Module) -> bool:
    function = getattr(vars(module).get("forward"), "__func__", None)
    return function is _eager_forward or function is _sdpa_forward


# ---- the two forwards: signatures and results of the library's classes


def _eager_forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, Tensor]:
    weights, value = _weights_and_values(self, hidden_states)
    dropped = F.dropout(weights, p=self.dropout, training=self.training)
    return _project(self, dropped @ value, hidden_states), weights.flatten(0, 1)


def _sdpa_forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, None]:
    query, key, value, grid = _heads(self, hidden_states)  # this class has no dropout
    if self.use_rel_pos:
        tables = self.rel_pos_h, self.rel_pos_w
        out = rel_pos_attention(query, key, value, *tables, grid, grid, scale=self.scale)
    else:
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
    return _project(self, out, hidden_states), None


# Bound methods are pickled by name: a patched model, saved, loads with the library's forward.
_eager_forward.__name__ = _sdpa_forward.__name__ = "forward"


def _heads(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """q, k, v as ``[B, heads, S, D]``, views; and the grid."""
    batch, height, width, _ = hidden_states.shape
    qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, self.num_attention_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value, (height, width)


def _weights_and_values(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + bias)`` as ``[B, heads, S, S]``, and v as ``[B, heads, S, D]``.

    Rounded where the eager class rounds: logits in the dtype of q, softmax in float32, weights in
    the dtype of q.
    """
    query, key, value, grid = _heads(self, hidden_states)
    scores = (query * self.scale) @ key.mT  # ours alone, and matmul does not save it for backward
    if self.use_rel_pos:
        scores = add_decomposed_rel_pos(scores, query, self.rel_pos_h, self.rel_pos_w, grid, grid, inplace=True)
    scores = F.softmax(scores, dim=-1, dtype=torch.float32)
    return scores.to(query.dtype), value


def _project(self: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    """``[B, heads, S, D]`` -> ``[B, height, width, C]``, through the output projection."""
    return self.proj(out.transpose(1, 2).reshape(hidden_states.shape[:-1] + (-1,)))
