"""SAM of transformers: its vision attention with the bias added to the logits in one pass.

    patch(model)                 # every SamVisionAttention and SamVisionSdpaAttention in it
    unpatch(model)               # as if nothing had happened
    with patched(model): ...     # both

Only ``forward`` of the module *instances* is replaced: classes, parameters, state_dict and hooks stay.

    stock     logits, bias, logits + bias, softmax     four tensors of size S x S in turn, three alive at once
    patched   logits, softmax                          the bias goes into the logits as it is computed
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import add_decomposed_rel_pos


def patch(model: nn.Module) -> int:
    """Runs the vision attention of a transformers SAM model on :func:`relpos_cuda.add_decomposed_rel_pos`.

    Args:
        model: Any module that contains SAM's vision attention: SamModel, SamVisionModel, a layer, a single
            attention; ``attn_implementation`` "eager" or "sdpa". Any device and dtype; training and inference.

    Returns:
        The number of attention modules that are patched now; calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or has no SAM.
        ValueError: ``model`` has no such module, or something else has replaced the ``forward`` of one.
    """
    modules = _attentions(model)
    for module in modules:
        if not _is_patched(module):
            module.forward = types.MethodType(forward, module)
    return len(modules)


def unpatch(model: nn.Module) -> int:
    """Gives every module that :func:`patch` changed the ``forward`` of its class back; returns how many."""
    modules = [module for module in model.modules() if _is_patched(module)]
    for module in modules:
        del module.forward
    return len(modules)


@contextmanager
def patched(model: nn.Module) -> Iterator[int]:
    """:func:`patch` for the length of a ``with`` block; modules that were patched before stay patched after it."""
    before = {module for module in model.modules() if _is_patched(module)}
    number = patch(model)
    try:
        yield number
    finally:
        for module in model.modules():
            if module not in before:
                unpatch_one(module)


def forward(
    self: nn.Module, hidden_states: Tensor, output_attentions: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the module's class computes, and returns, with one S x S tensor less to write and read twice.

    The bias takes the unscaled query. Logits are kept in the dtype of the model, and the softmax is float32,
    as in the eager class; weights are returned only where the class returns them.
    """
    batch, height, width, _ = hidden_states.shape
    grid = (height, width)
    qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, self.num_attention_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, S, D], views

    weights = (query * self.scale) @ key.mT  # [B, heads, S, S]; matmul does not save it, so it may be overwritten
    if self.use_rel_pos:
        weights = add_decomposed_rel_pos(weights, query, self.rel_pos_h, self.rel_pos_w, grid, grid, inplace=True)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32)
    weights = weights.to(query.dtype)  # on its own line: the logits are free by now

    if not _returns_weights(self):
        weights, returned = weights, None
    ...
