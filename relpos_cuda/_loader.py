"""Loads each native library once: the one built at installation if it fits this machine, else one compiled here.

A library that cannot be had costs speed and never a result: one warning says why, and the PyTorch path takes over.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import _build, _env, _libraries, _toolchain
from ._build import BuildError

_PREBUILT = Path(__file__).resolve().parent / "_prebuilt"
_TITLES = {"plan": "planner", "cpu": "CPU library", "cuda": "CUDA library"}
_READ_BY = {"plan": (), "cpu": (_env.CPU_ISA,), "cuda": (_env.WGMMA,)}  # what they read themselves, without a word


@dataclass(frozen=True)
class Status:
    """What became of a library."""

    origin: str  # "prebuilt", "compiled", "disabled", "failed", "not loaded"
    path: Path | None = None
    reason: str = ""
    module: ModuleType | None = None

    @property
    def usable(self) -> bool:
        return self.path is not None

    def __str__(self) -> str:
        return f"{self.origin}: {self.path or self.reason}" if self.path or self.reason else self.origin


_states: dict[str, Status] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: whichever thread held the lock does not exist there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def load(kind: str) -> bool:
    """Whether the kernels for ``"cpu"`` or ``"cuda"`` tensors are registered; loads them first if need be.

    Raises:
        BuildError: They cannot be had, and RELPOS_CUDA_STRICT is set.
    """
    return _state(kind).usable


def plan() -> ModuleType | None:
    """The planner (csrc/plan_bindings.cpp), or None if it cannot be had.

    Raises:
        BuildError: It cannot be had, and RELPOS_CUDA_STRICT is set.
    """
    return _state("plan").module


def status() -> dict[str, Status]:
    """What became of each library so far; loads nothing."""
    return {kind: _states.get(kind, Status("not loaded")) for kind in _TITLES}


def _state(kind: str) -> Status:
    state = _states.get(kind)  # without the lock: the usual case
    if state is None:
        with _lock:
            if kind not in _states:
                _states[kind] = _first_load(kind)
            state = _states[kind]
    if state.origin == "failed" and _env.STRICT():
        raise BuildError(state.reason)
    return state


def _first_load(kind: str) -> Status:
    if _env.DISABLE():
        return Status("disabled", reason=f"{_env.DISABLE.name} is set")
    try:
        for variable in _READ_BY[kind]:
            variable()
        return _open_prebuilt(kind) or _open_compiled(kind)
    except (BuildError, OSError, ImportError, _env.BadValueError) as error:
        if not _env.STRICT():
            text = f"relpos_cuda: no native {_TITLES[kind]}, using the slower PyTorch path: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return Status("failed", reason=str(error))


def _open_prebuilt(kind: str) -> Status | None:
    """None where the installation brought no library, or one that this machine cannot use."""
    path = _PREBUILT / _libraries.FILENAMES[kind]
    if not path.is_file():
        return None
    described = _build.sidecar_of(path)
    if described.get("versions", {}).get("machine") != platform.machine():
        return None
    if kind == "cuda" and _misfit(path):
        return None
    try:
        return Status("prebuilt", path, module=_open(kind, path))
    except (OSError, ImportError):
        return None  # of another C library, say: what is compiled here will do


def _open_compiled(kind: str) -> Status:
    if _env.NO_JIT():
        raise BuildError(f"none was built at installation that fits, and {_env.NO_JIT.name} is set")
    path = _build.build(kind)
    if kind == "cuda" and (misfit := _misfit(path)):
        raise BuildError(misfit, f"add it to {_env.ARCH_LIST.name}, or unset that")
    try:
        return Status("compiled", path, module=_open(kind, path))
    except (OSError, ImportError) as error:
        if _build.is_as_built(path):
            forbidden = "failed to map segment" in str(error)
            hint = f"the folder forbids execution: set {_env.CACHE_DIR.name} to another" if forbidden else ""
            raise BuildError(f"{path} cannot be loaded: {error}", hint) from error
        path.unlink(missing_ok=True)  # damaged since: once more
        path = _build.build(kind)
        return Status("compiled", path, module=_open(kind, path))


def _misfit(library: Path) -> str:
    """Which visible GPU the library has no code for, or nothing."""
    archs = _build.archs_of(library)
    for capability in _toolchain.visible_capabilities():
        if not _toolchain.fits(archs, capability):
            number = ".".join(map(str, capability))
            return f"compiled for {', '.join(archs)}, which does not run on a GPU of compute capability {number}"
    return ""


def _open(kind: str, path: Path) -> ModuleType | None:
    if kind != "plan":
        torch.ops.load_library(path)
        return None
    name = f"{__package__}._plan"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
