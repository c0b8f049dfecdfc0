"""Transformers: SAM and its relatives, ViTDet and ViTMatte, SegGPT.

Three shapes of one attention: classes that return ``(out, weights)`` whether asked or not (SAM, eager), those that
return ``(out, None)`` (SAM, sdpa), and those that return weights on demand (ViTDet, SegGPT).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modules import attention_of_qkv
from .adapters import Adapter, stock

MODELS = "transformers.models"


def of_sam(model: str, prefix: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"{MODELS}.{model}.modeling_{model}.{prefix}{suffix}" for suffix in suffixes)


EAGER, SDPA = "VisionAttention", "VisionSdpaAttention"
SAM_EAGER = (
    *of_sam("sam", "Sam", EAGER),
    *of_sam("sam_hq", "SamHQ", EAGER),
    *of_sam("got_ocr2", "GotOcr2", EAGER),
    *of_sam("deepseek_ocr2", "DeepseekOcr2Sam", EAGER),
    *of_sam("unlimited_ocr", "UnlimitedOcrSam", EAGER),
    *of_sam("slanext", "SLANeXt", EAGER),
    *of_sam("pp_formulanet", "PPFormulaNet", EAGER),
)
SAM_SDPA = (
    *of_sam("sam", "Sam", SDPA),
    *of_sam("sam_hq", "SamHQ", SDPA),
    *of_sam("deepseek_ocr2", "DeepseekOcr2Sam", SDPA),
    *of_sam("unlimited_ocr", "UnlimitedOcrSam", SDPA),
)


def sam_eager(self: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, Tensor | None]:
    if output_attentions or weights_are_captured(self) or (self.training and self.dropout):
        return stock(self, hidden_states, output_attentions)
    return attended(self, hidden_states, self.use_rel_pos), None


def sam_sdpa(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, None]:
    if output_attentions:
        return stock(self, hidden_states, output_attentions)  # warns that there are none
    return attended(self, hidden_states, self.use_rel_pos), None


def seggpt(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
    if output_attentions:
        return stock(self, hidden_states, output_attentions)
    return attended(self, hidden_states, self.use_relative_position_embeddings), None


def vitdet(self: Any, hidden_state: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
    if output_attentions:
        return stock(self, hidden_state, output_attentions)
    return (attended(self, hidden_state, self.use_relative_position_embeddings),)


def attended(self: Any, hidden_states: Tensor, has_tables: bool) -> Tensor:
    heads = self.num_heads if hasattr(self, "num_heads") else self.num_attention_heads
    tables = (self.rel_pos_h, self.rel_pos_w) if has_tables else None
    return self.proj(attention_of_qkv(self.qkv(hidden_states), heads, self.scale, tables))


def weights_are_captured(self: Any) -> bool:
    """By a hook: of the library, while a caller has asked for attentions, or of somebody else."""
    for hook in self._forward_hooks.values():
        if getattr(hook, "__name__", "") != "output_capturing_hook":
            return True
        from transformers.utils.output_capturing import _active_collector

        collector = _active_collector.get()
        if collector is not None and "attentions" in collector:
            return True
    return False


ADAPTERS = (
    Adapter("transformers", SAM_EAGER, sam_eager),
    Adapter("transformers", SAM_SDPA, sam_sdpa),
    Adapter("transformers", of_sam("seggpt", "SegGpt", "Attention"), seggpt),
    Adapter("transformers", of_sam("vitdet", "VitDet", "Attention"), vitdet),
)
