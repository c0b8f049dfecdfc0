"""What an adapter is, which there are, and which of them a module is for."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import weakref
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


class Bound:
    """A method of a module that does not hold the module: deleted, that gives its memory back at once.

    A bound method in the ``__dict__`` of its module would be a cycle, for Python's collector to find one day.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self._module = function, weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward is gone")
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(self.function, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """Of a copy, where it is copied with its module."""
        return Bound(self.function, memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: a saved model loads with the forward of the library."""
        return getattr, (self.module, "forward")


def is_ours(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), Bound)
