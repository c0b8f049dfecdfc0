"""Every environment variable that relpos_cuda reads: one row each. The README table is printed from here."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class BadValueError(ValueError):
    """What a variable is set to cannot be read; names the variable."""


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable; unset and empty mean the same."""

    name: str
    default: str
    meaning: str
    parse: Callable[[str], T]
    default_text: str = ""  # for people, where the default is not a value

    def is_set(self) -> bool:
        return bool(os.environ.get(self.name))

    def __call__(self) -> T:
        """The value in force now.

        Raises:
            BadValueError: What is set cannot be read.
        """
        text = os.environ.get(self.name) or self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise BadValueError(f"{self.name}={text!r}: {error}") from None


def _switch(text: str) -> bool:
    if text.lower() in ("1", "on", "yes", "true"):
        return True
    if text.lower() in ("0", "off", "no", "false"):
        return False
    raise ValueError("wanted 0 or 1")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"wanted one of {', '.join(choices)}")
        return text.lower()

    return parse


def _count(text: str) -> int:
    """A positive number; for no text, the processors this process may use."""
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("wanted a positive whole number")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _cache(text: str) -> Path:
    """The folder as given; for no text, where this user's caches are."""
    if text:
        return Path(text).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):  # a user without a home: nothing can be made under this, so the builder falls back
        caches = os.devnull
    return Path(caches).absolute() / "relpos_cuda"


CACHE_DIR = Variable(
    "RELPOS_CUDA_CACHE_DIR",
    "",
    "Where libraries compiled on first use are kept.",
    _cache,
    "`$XDG_CACHE_HOME/relpos_cuda`, `~/.cache/relpos_cuda`",
)
VERBOSE = Variable("RELPOS_CUDA_VERBOSE", "0", "1: show compile commands and compiler output.", _switch)
DISABLE = Variable("RELPOS_CUDA_DISABLE", "0", "1: never use native kernels, always the PyTorch path.", _switch)
BUILD = Variable(
    "RELPOS_CUDA_BUILD",
    "auto",
    "What `pip install` compiles: `auto` (what the machine can; never fails), `0`, `cpu`, `cuda`, `all`.",
    _one_of("auto", "0", "cpu", "cuda", "all"),
)
NO_JIT = Variable("RELPOS_CUDA_NO_JIT", "0", "1: never compile on first use.", _switch)
STRICT = Variable(
    "RELPOS_CUDA_STRICT", "0", "1: a library that cannot be built or loaded is an error, not a warning.", _switch
)
CXXFLAGS = Variable("RELPOS_CUDA_CXXFLAGS", "", "More flags for the C++ compiler.", _words)
NVCCFLAGS = Variable("RELPOS_CUDA_NVCCFLAGS", "", "More flags for nvcc.", _words)
CPU_ISA = Variable(
    "RELPOS_CUDA_CPU_ISA",
    "avx512_bf16",
    "The most that CPU kernels may use: `baseline`, `avx2`, `avx512`, `avx512_bf16`.",  # read by csrc/cpu, listed here
    _one_of("baseline", "avx2", "avx512", "avx512_bf16"),
    "the best the processor has",
)
WGMMA = Variable(
    "RELPOS_CUDA_WGMMA",
    "auto",
    "On sm_90, whether the attention in half precision takes the kernels with TMA and `wgmma`: `auto` (where they are "
    "faster), `0`, `1` (wherever they can).",  # read by csrc/cuda, listed here
    _one_of("auto", "0", "1"),
)
ARCH_LIST = Variable(
    "TORCH_CUDA_ARCH_LIST",
    "",
    "GPU architectures to compile for: `8.0;9.0a+PTX`, or `native`.",
    str.strip,
    "the visible GPUs, else `9.0a`",
)
MAX_JOBS = Variable("MAX_JOBS", "", "Compiler processes at once.", _count, "one per processor")
CUDA_HOME = Variable("CUDA_HOME", "", "The CUDA toolkit.", str, "`CUDA_PATH`, or that of the `nvcc` found")
CUDA_PATH = Variable("CUDA_PATH", "", "As `CUDA_HOME`, which goes first.", str)
CXX = Variable("CXX", "", "The C++ compiler.", _words, "`c++`, `g++`, `clang++`")

ALL: tuple[Variable[Any], ...] = (
    CACHE_DIR,
    VERBOSE,
    DISABLE,
    BUILD,
    NO_JIT,
    STRICT,
    CXXFLAGS,
    NVCCFLAGS,
    CPU_ISA,
    WGMMA,
    ARCH_LIST,
    MAX_JOBS,
    CUDA_HOME,
    CUDA_PATH,
    CXX,
)


def markdown_table() -> str:
    """The table of the README."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for variable in ALL:
        default = variable.default_text or (f"`{variable.default}`" if variable.default else "")
        rows.append(f"| `{variable.name}` | {default} | {variable.meaning} |")
    return "\n".join(rows)
