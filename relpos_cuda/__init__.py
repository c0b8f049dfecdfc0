"""Fused decomposed relative position attention for PyTorch.

Source: https://arxiv.org/abs/2112.01526 (MViTv2) defines the term; SAM and ViTDet made it ubiquitous.
"""

from . import _flops as _flops  # FlopCounterMode knows the ops
from . import reference
from .functional import add_decomposed_rel_pos, decomposed_rel_pos, get_rel_pos, rel_pos_attention
from .integrations.accelerate import Report, accelerate, restore
from .modules import RelPosAttention
from .support import is_supported

__version__ = "0.1.0"
__all__ = [
    "RelPosAttention",
    "Report",
    "accelerate",
    "add_decomposed_rel_pos",
    "decomposed_rel_pos",
    "get_rel_pos",
    "is_supported",
    "reference",
    "rel_pos_attention",
    "restore",
]
