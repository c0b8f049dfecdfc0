"""Compiles kernels for the shim: ``g++`` and the headers of CUDA, no GPU and no driver."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILT = ROOT / "build" / "emulated"

# Shared memory holds many types in turn, so type-based alias analysis would be wrong. With -O2, it takes the compiler
# twice as long, and the kernels are hardly faster.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
# A GPU faults on a misaligned vector; a CPU does not mind, so the compiler checks every access.
FLAGS += ["-fsanitize=alignment", "-fno-sanitize-recover=all"]
if "clang" not in os.environ.get("CXX", ""):
    FLAGS += ["-fno-gnu-unique"]  # else two such libraries in one process share the functions behind mma


SHIM = ("machine.cpp", "simt.cpp", "sm80.cpp", "sm90.cpp")
SHIM_FLAGS = ("-O3", "-fvisibility=hidden", "-fno-sanitize=alignment")  # it has no pointers of the kernel's


@dataclass(frozen=True)
class Sanitizer:
    """What kernels are compiled with. A process that loads them must be started with `environment`."""

    name: str
    flags: tuple[str, ...] = ()
    shim_flags: tuple[str, ...] = ()  # of the shim's own code
    runtimes: tuple[str, ...] = ()  # that must be loaded before all else
    options: tuple[tuple[str, str], ...] = ()

    @cached_property
    def environment(self) -> dict[str, str]:
        if not self.runtimes:
            return {}
        found = [_ask_compiler(f"-print-file-name={name}") for name in self.runtimes]
        return {"LD_PRELOAD": " ".join(found), **dict(self.options)}


PLAIN = Sanitizer("plain")
ADDRESS = Sanitizer(  # and undefined behaviour
    "address",
    flags=("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
    shim_flags=("-fsanitize=address",),
    runtimes=("libasan.so", "libstdc++.so"),  # the latter for exceptions, which the former intercepts
    options=(("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", "print_stacktrace=1")),
)
THREAD = Sanitizer(
    "thread",
    flags=("-g1", "-fno-omit-frame-pointer", "-fsanitize=thread", "-DSIMT_TSAN"),
    shim_flags=("-DSIMT_TSAN",),
    runtimes=("libtsan.so",),
    options=(("TSAN_OPTIONS", "halt_on_error=1 ignore_noninstrumented_modules=1"), ("SIMT_ASYNC", "early")),
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _ask_compiler(question: str) -> str:
    return subprocess.run([str(compiler()), question], check=True, capture_output=True, text=True).stdout.strip()


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


def compile_library(
    sources: Iterable[Path | tuple[Path, str]],
    library: Path,
    extra: Iterable[str] = (),
    root: Path = ROOT,
    sanitizer: Sanitizer = PLAIN,
) -> Path:
    """Builds one shared library out of kernel sources, some with a flag of their own, and the shim.

    What the kernels include of the shim, and that of csrc, is in `root`: the project, or a copy of it.
    """
    pairs = (source if isinstance(source, tuple) else (source, "") for source in sources)
    flags = [*sanitizer.flags, f"-I{root / HERE.relative_to(ROOT)}", *extra]
    with tempfile.TemporaryDirectory() as folder:
        objects = _compile([(source, (flag, *flags)) for source, flag in pairs], Path(folder))
        link = ["-shared", "-Wl,-Bsymbolic", *(f for f in sanitizer.flags if f.startswith("-fsanitize"))]
        _run(*FLAGS, *link, *objects, *_shim(sanitizer.shim_flags), *extra, "-o", str(library))
    return library


def _shim(flags: tuple[str, ...]) -> list[str]:
    """Its objects, compiled once per content."""
    flags = (*SHIM_FLAGS, *flags)
    digest = hashlib.sha256(repr([compiler(), FLAGS, flags]).encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = BUILT / f"shim-{digest.hexdigest()[:16]}"
    with locked(folder) as is_there:
        if not is_there:
            _compile([(HERE / name, flags) for name in SHIM], folder)
    return [str(folder / f"{i}.o") for i in range(len(SHIM))]


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """For the one process at a time that fills a folder; whether another has."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield done.exists()
        done.touch()


def _compile(units: list[tuple[Path, tuple[str, ...]]], folder: Path) -> list[str]:
    """Objects of sources, each with flags of its own; as many at once as there are processors."""
    objects = [str(folder / f"{i}.o") for i in range(len(units))]
    include = ["-DRELPOS_EMULATE", "-isystem", str(cuda_include())]

    def compile_unit(unit: tuple[Path, tuple[str, ...]], output: str) -> None:
        source, flags = unit
        _run(*FLAGS, *include, *filter(None, flags), "-x", "c++", "-c", str(source), "-o", output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, units, objects))
    return objects


def _run(*arguments: str) -> None:
    command = [str(compiler()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
