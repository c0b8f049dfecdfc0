"""How it is compiled: units to a build.ninja, ninja run over it, and the error that matters out of its log."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from . import _env, _toolchain
from ._libraries import Library, Unit
from ._toolchain import BuildError

BUILD_FILE, LOG, PTXAS_LOG = "build.ninja", "build.log", "ptxas.log"

# -v of ptxas is kept apart: it is no complaint, and ninja would print it.
_RULES = r"""ninja_required_version = 1.5
builddir = .

rule cxx
  command = $invoke -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = g++ $out
rule nvcc
  command = $invoke -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; false; }
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule link
  command = $invoke
  description = link $out
"""


def compile_library(library: Library, folder: Path, lock: int | None = None) -> Path:
    """Compiles and links in ``folder``, going on from what an interrupted run left there.

    Args:
        lock: A file descriptor that the compilers inherit: should this process be killed, the lock on it is held until
            they have ended, too, and nobody else writes into ``folder`` beside them.

    Returns:
        The library, in ``folder``.

    Raises:
        BuildError: With the first compiler error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILD_FILE).write_text(_build_file(library))
    command = [_toolchain.ninja(), "-j", str(_env.MAX_JOBS())]
    if _env.VERBOSE():
        command.append("-v")
    log = folder / LOG
    with log.open("wb") as stream:  # a file, not a pipe: ninja may outlive this process
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},  # first_error reads English
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
        )
    text = log.read_text(errors="replace")
    if _env.VERBOSE():
        print(text, file=sys.stderr, flush=True)
    if done.returncode:
        raise BuildError(f"{library.title} did not compile: {first_error(text)}", hint_for(text), log)
    reports = [folder / f"{unit.object}.log" for unit in library.units if unit.compiler == "nvcc"]
    if reports:
        (folder / PTXAS_LOG).write_text("".join(r.read_text(errors="replace") for r in reports))
    return folder / library.filename


def _build_file(library: Library) -> str:
    jobs, units = _env.MAX_JOBS(), len(library.units)
    edges = [_edge(unit, library, threads=max(1, jobs // units)) for unit in library.units]
    objects = " ".join(unit.object for unit in library.units)
    link = [*_toolchain.cxx(), "-shared", "-o", library.filename]
    link += [unit.object for unit in library.units]
    link += [*library.link_inputs, *library.link_flags]
    edges.append(f"build {library.filename}: link {objects}\n  invoke = {_escaped_command(link)}\n")
    return _RULES + "\n" + "\n".join(edges)


def _edge(unit: Unit, library: Library, threads: int) -> str:
    if unit.compiler == "nvcc":
        compiler = [str(_toolchain.nvcc().path), "--threads", str(threads)]  # of them, an architecture each
        if len(_env.CXX()) == 1:
            compiler += ["-ccbin", _toolchain.cxx()[0]]
    else:
        compiler = list(_toolchain.cxx())
    include = [f"-I{folder}" for folder in library.include]
    system = [word for folder in library.system_include for word in ("-isystem", str(folder))]
    command = _escaped_command([*compiler, *unit.flags, *include, *system])
    return f"build {unit.object}: {unit.compiler} {_escaped_path(unit.source)}\n  invoke = {command}\n"


def _escaped_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _escaped_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


# ---- reading a log

_ERRORS = re.compile(
    r"""^.*?(
        [^\s:()]+:\d+(:\d+)?:\s+(fatal\s+)?error:\s.*           # g++, clang
      | [^\s()]+\(\d+\):\s+(catastrophic\s+)?error(\s\#?[\w-]+)?:\s.*  # nvcc
      | nvcc\s+(fatal|error)\s*:\s.*
      | ptxas\s.*(fatal|error)\s*:\s.*
      | .*\bld(\.\w+)?:\s.*(cannot\sfind|undefined|error).*
      | .*undefined\sreference\sto\s.*
      | .*(internal\scompiler\serror|No\sspace\sleft|out\sof\smemory|Killed).*
      | ninja:\s(error|fatal):\s.*
      | .*:\s(not\sfound|command\snot\sfound|Permission\sdenied)$
    )""",
    re.MULTILINE | re.VERBOSE,
)

_HINTS = {
    r"No space left on device|Disk quota exceeded": "the disk is full: free some space or move RELPOS_CUDA_CACHE_DIR",
    r"\bKilled\b|out of memory|[Cc]annot allocate memory|code=137": "the compiler ran out of memory: set MAX_JOBS=1",
    r"unsupported (GNU|clang) version": "this nvcc cannot work with so new a C++ compiler: set CXX to an older one",
    r"Unsupported gpu architecture": "this nvcc does not know an architecture of TORCH_CUDA_ARCH_LIST",
    r"torch/(csrc/stable|headeronly)/\S+: No such file": "relpos_cuda needs PyTorch 2.10 or newer, with its headers",
    r"Python\.h: No such file": "install python3-dev (python3-devel)",
    r"(cuda_\w+\.h|nv/target|crt/\S+): No such file": "the CUDA toolkit is incomplete: install all of it",
    r"cannot find -ltorch": "this PyTorch has no libtorch.so: install it again",
    r"unrecognized .*option|unknown argument": "the compiler is too old, or RELPOS_CUDA_CXXFLAGS is wrong",
    r"(not found|Permission denied)$": "a compiler does not start: check CXX and CUDA_HOME",
}


def first_error(log: str) -> str:
    """The first line with which a compiler or linker says what is wrong."""
    if found := _ERRORS.search(log):
        return found[1].strip()
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("ninja: build stopped")]
    return lines[-1].strip() if lines else "no output"


def hint_for(log: str) -> str:
    """One line of advice for the usual causes, or nothing."""
    return next((hint for pattern, hint in _HINTS.items() if re.search(pattern, log, re.MULTILINE)), "")
