"""The attention of segment_anything, and of all that have copied it: HQ-SAM, ViTDet of detectron2, kornia, MedSAM, ...

    forward(x): [B, H, W, C] -> [B, H, W, C]; qkv, num_heads, scale, use_rel_pos, rel_pos_h, rel_pos_w, proj

A class that is not in the list is taken for a copy if its forward uses the names of the original and no others, and if
it then gives the original's numbers (:func:`disagrees`).
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..modules import attention_of_qkv
from .adapters import Adapter, class_of_forward, name_of

LISTED = (
    "segment_anything.modeling.image_encoder.Attention",
    "segment_anything_hq.modeling.image_encoder.Attention",
    "detectron2.modeling.backbone.vit.Attention",
    "kornia.models.sam.architecture.image_encoder.Attention",
    "ultralytics.models.sam.modules.blocks.REAttention",
)
NEEDED = {"qkv", "num_heads", "scale", "use_rel_pos", "rel_pos_h", "rel_pos_w", "add_decomposed_rel_pos", "proj"}
ALLOWED = NEEDED | {"shape", "reshape", "permute", "unbind", "transpose", "softmax", "view", "Tensor", "torch"}
AGREES = 1e-4  # of the largest value, in float32


def forward(self: Any, x: Tensor) -> Tensor:
    tables = (self.rel_pos_h, self.rel_pos_w) if self.use_rel_pos else None
    return self.proj(attention_of_qkv(self.qkv(x), self.num_heads, self.scale, tables))


def is_copy(cls: type) -> bool:
    code = getattr(vars(cls)["forward"], "__code__", None)
    if code is None or code.co_argcount != 2:
        return False
    return NEEDED <= set(code.co_names) <= ALLOWED


def disagrees(module: Any) -> str | None:
    """Both forwards on random numbers, with weights and tables of the shapes of this instance."""
    draw = torch.Generator().manual_seed(0)
    width = module.num_heads * module.rel_pos_h.shape[-1] if module.use_rel_pos else module.proj.in_features
    probe = twin_of(module)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        weights = {
            name: torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5 for name, p in probe.named_parameters()
        }
        x = torch.randn(1, 3, 4, width, generator=draw)
        theirs = functional_call(probe, weights, (x,))
        probe.forward = types.MethodType(forward, probe)
        ours = functional_call(probe, weights, (x,))
    if ours.shape == theirs.shape and (ours - theirs).abs().max() <= AGREES * theirs.abs().max():
        return None
    return "its forward has the names of segment_anything's, but other results"


def twin_of(module: nn.Module) -> nn.Module:
    """The same parameters in a module of its own, whose calls nothing of the original sees: no hooks, no state."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    twin._modules = {name: child if child is None else twin_of(child) for name, child in module._modules.items()}
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def is_not_plain(module: nn.Module) -> str | None:
    if name_of(class_of_forward(module)) in LISTED:
        return None
    try:
        return disagrees(module)
    except Exception as error:  # whatever a forward that nobody has seen has against our numbers
        return f"its forward has the names of segment_anything's, but raises {type(error).__name__} on a grid of 3 x 4"


ADAPTERS = (Adapter("segment_anything", LISTED, forward, is_not_plain, is_copy),)
