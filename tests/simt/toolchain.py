"""Compiles kernels for the shim: ``g++`` and the headers of CUDA, no GPU and no driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent

# Shared memory holds many types in turn, so type-based alias analysis would be wrong.
FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
# A GPU faults on a misaligned vector; a CPU does not mind, so the compiler checks every access.
FLAGS += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def cuda_include() -> Path | None:
    """The folder of ``cuda_fp16.h``: of CUDA_HOME or CUDA_PATH, else of the nvcc on the path."""
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    candidates = [Path(home, "include") for home in homes]
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        candidates += [Path(folder) for folder in re.findall(r'INCLUDES="-I([^"]+)"', dryrun)]
        candidates += [Path(top, "include") for top in re.findall(r"^#\$ TOP=(.+)$", dryrun, re.M)]
    return next((c.resolve() for c in candidates if (c / "cuda_fp16.h").is_file()), None)


def missing() -> str | None:
    """Why kernels cannot be emulated on this machine, or None."""
    if not compiler():
        return "no C++ compiler"
    return None if cuda_include() else "no CUDA headers (cuda_fp16.h): set CUDA_HOME"


def compile_library(sources: Iterable[Path], library: Path, extra: Iterable[str] = (), shim: Path = HERE) -> Path:
    """Builds one shared library out of kernel sources and the shim, or a copy of it."""
    include = ["-DRELPOS_EMULATE", f"-I{shim}", "-isystem", str(cuda_include())]
    inputs = [str(s) for s in (*sources, shim / "simt.cpp")]
    command = [compiler(), *FLAGS, *include, "-shared", "-Wl,-Bsymbolic", "-x", "c++", *inputs]
    command += ["-x", "none", *extra, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library
