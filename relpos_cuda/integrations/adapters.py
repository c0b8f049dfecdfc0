"""What an adapter is, which there are, and which of them a module is for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

# One module of this package per library; each has ADAPTERS, and imports nothing of the library.
LIBRARIES = ("transformers", "sam_like", "timm", "torchvision", "mmpretrain", "monai", "detectron2")


def never(module: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Adapter:
    """Our forward in the place of that of some classes.

    Args:
        library: As reports show it.
        classes: ``"package.module.Class"`` of every class that defines the forward it stands for. A subclass that
            inherits that forward is meant too; one with a forward of its own is not.
        forward: Takes the instance and what the library's forward takes, returns what that returns. What it cannot do
            it leaves to :func:`stock`.
        refuses: Why an instance must keep its own forward for good, or None.
        recognizes: Whether a class that is not in ``classes`` is a copy of one of them.
    """

    library: str
    classes: tuple[str, ...]
    forward: Callable[..., Any]
    refuses: Callable[[Any], str | None] = never
    recognizes: Callable[[type], bool] | None = None

    def __post_init__(self) -> None:
        self.forward.__name__ = "forward"  # bound methods are pickled by name: a saved model loads with the library's


def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the library, on an instance that has ours."""
    return type(module).forward(module, *args, **kwargs)


@functools.cache
def adapters() -> tuple[Adapter, ...]:
    found = (importlib.import_module(f"{__package__}.{library}").ADAPTERS for library in LIBRARIES)
    return tuple(adapter for some in found for adapter in some)


def adapter_of(module: nn.Module) -> Adapter | None:
    """By the class that defines its forward: by name first, then by what the forward does."""
    cls = class_of_forward(module)
    by_name = (a for a in adapters() if name_of(cls) in a.classes)
    copies = (a for a in adapters() if a.recognizes and a.recognizes(cls))
    return next(by_name, None) or next(copies, None)


def class_of_forward(module: nn.Module) -> type:
    """The class that defines it; FSDP and others put classes of their own above."""
    return next(c for c in type(module).__mro__ if "forward" in vars(c))


def name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_ours(module: nn.Module) -> bool:
    function = getattr(vars(module).get("forward"), "__func__", None)
    return any(function is adapter.forward for adapter in adapters())
