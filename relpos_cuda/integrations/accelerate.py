"""``accelerate(model)`` and ``restore(model)``: our forward on the attention modules of a model, and off again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..modules import RelPosAttention
from .adapters import Adapter, Bound, adapter_of, is_ours

FUSED = "fused"


@dataclass(frozen=True)
class Finding:
    """An attention module of a model."""

    name: str  # as in model.named_modules()
    kind: str  # its class
    library: str  # as of the adapter; empty if there is none
    reason: str = ""  # why it is as it was

    @property
    def replaced(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` found; prints as a table."""

    found: tuple[Finding, ...]

    @property
    def replaced(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.found if f.replaced)

    @property
    def skipped(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.found if not f.replaced)

    def __str__(self) -> str:
        if not self.found:
            return "no attention with decomposed relative positions was found"
        alike = Counter((f.library or "?", f.kind, f.reason or FUSED) for f in self.found)
        rows = [("library", "class", "modules", "forward")]
        rows += [(library, kind, str(count), what) for (library, kind, what), count in alike.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Runs the attention of a model on :func:`relpos_cuda.rel_pos_attention`.

    The ``forward`` of the attention *instances* is replaced, and nothing else: classes, parameters, state_dict, hooks,
    device and dtype stay as they are, and may change later. A second call changes nothing. Where attention weights are
    asked for, or dropout is at work, an instance falls back to the library's forward for that call.

    Args:
        model: Any module; a wrapped one too (DistributedDataParallel, FSDP, torch.compile). Any device and dtype.

    Returns:
        What was found, replaced, and skipped for which reason: :class:`Report`.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Source: models of segment_anything, transformers, timm, torchvision, detectron2 and others; README has the list.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = []
    for name, module in model.named_modules():
        if adapter := adapter_of(module):
            kind = type(module).__name__
            found.append(Finding(name, kind, adapter.library, put_on(module, adapter) or ""))
        elif isinstance(module, RelPosAttention):
            found.append(Finding(name, type(module).__name__, "relpos_cuda", "fused as it is"))
        elif has_tables(module):
            found.append(Finding(name, type(module).__name__, "", "its class is not known"))
    return Report(tuple(found))


def put_on(module: nn.Module, adapter: Adapter) -> str | None:
    """Why not, if not."""
    if is_ours(module):
        return None
    if "forward" in vars(module) and not is_of_its_class(module):
        return "something else has replaced its forward"
    if reason := adapter.refuses(module):
        return reason
    module.forward = Bound(adapter.forward, module)
    return None


def is_of_its_class(module: nn.Module) -> bool:
    """Whether its own ``__dict__`` has the forward of its class, as in a model that was saved with ours and loaded."""
    return getattr(vars(module).get("forward"), "__func__", None) is type(module).forward


def has_tables(module: nn.Module) -> bool:
    return any(name.startswith("rel_pos_") for name, _ in module.named_parameters(recurse=False))


def restore(model: nn.Module) -> int:
    """Gives every module that :func:`accelerate` changed the ``forward`` of its class back.

    Args:
        model: As it was given to :func:`accelerate`, or any that contains it.

    Returns:
        How many modules there were.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Source: the counterpart of :func:`accelerate`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    ours = [module for module in model.modules() if is_ours(module)]
    loaded = [module for module in model.modules() if is_of_its_class(module)]
    for module in (*ours, *loaded):
        del module.forward
    return len(ours)
