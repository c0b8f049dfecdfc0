"""What this machine compiles with: compilers, ninja, headers of PyTorch, Python and pybind11; and for which GPUs.

Nothing here imports torch: setup.py asks the same questions while PyTorch is hidden from it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import _env

Capability = tuple[int, int]

OLDEST_TORCH = "2.10"  # the first with the stable ABI that csrc is written against
OLDEST_ARCH = 80  # bfloat16 tensor cores and asynchronous copies
ARCH_WITHOUT_GPU = "90a"
# Devices whose full instruction set needs the architecture-specific target.
_SPECIFIC_ARCHS = {(9, 0): "90a", (10, 0): "100a", (10, 3): "103a", (12, 0): "120a", (12, 1): "121a"}


class BuildError(RuntimeError):
    """A native library cannot be built; the message says why and what helps."""

    def __init__(self, message: str, hint: str = "", log: Path | None = None):
        lines = [message, f"hint: {hint}" if hint else "", f"full log: {log}" if log else ""]
        super().__init__("\n".join(filter(None, lines)))


def output_of(*command: str | Path) -> str:
    """Both streams of a short command, or nothing if it does not run at all."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


# ---- C++


@functools.cache
def _cxx(wanted: tuple[str, ...], path: str | None) -> tuple[str, ...]:
    for command in [wanted] if wanted else [("c++",), ("g++",), ("clang++",)]:
        if found := shutil.which(command[0], path=path):
            return (found, *command[1:])
    if wanted:
        raise BuildError(f"no C++ compiler: CXX={' '.join(wanted)} is not there", "correct or unset CXX")
    raise BuildError("no C++ compiler found", "install g++ (package g++ or gcc-c++), or set CXX")


def cxx() -> tuple[str, ...]:
    """The C++ compiler, with the arguments that CXX may carry (``ccache g++``)."""
    return _cxx(_env.CXX(), os.environ.get("PATH"))


@functools.cache
def version_of(command: Sequence[str | Path]) -> str:
    """The line of ``--version`` that has the version in it."""
    lines = output_of(*command, "--version").splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), "unknown")


def ninja() -> str:
    """The ninja executable: of the Python package, else on the path."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    for name in ("ninja", "ninja-build"):
        found = (BIN_DIR and shutil.which(name, path=BIN_DIR)) or shutil.which(name)
        if found:
            return found
    raise BuildError("ninja not found", "pip install ninja")


# ---- headers


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str  # "" without CUDA

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def _find_package(name: str) -> Path | None:
    """Folder of a package, without importing it."""
    if name in sys.modules:
        spec = sys.modules[name].__spec__
    else:
        spec = importlib.util.find_spec(name)
    if spec and spec.origin:
        return Path(spec.origin).parent
    # pip hides the target environment from a build through PYTHONPATH; an interpreter that ignores it sees all.
    find = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin or '')"
    origin = output_of(sys.executable, "-E", "-c", find).strip()
    return Path(origin).parent if os.path.isfile(origin) else None


@functools.cache
def torch() -> Torch:
    root = _find_package("torch")
    if root is None:
        raise BuildError("PyTorch not found", f"pip install 'torch>={OLDEST_TORCH}'")
    text = (root / "version.py").read_text()

    def value_of(name: str) -> str:
        found = re.search(rf"^{name}\b[^=]*= ['\"]([^'\"]+)", text, re.MULTILINE)
        return found[1] if found else ""

    version, cuda = value_of("__version__"), value_of("cuda")
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(
            f"PyTorch {version} has no stable-ABI headers (torch/csrc/stable)",
            f"relpos_cuda needs PyTorch {OLDEST_TORCH} or newer, with its headers",
        )
    return Torch(root, version, cuda)


def python_include() -> Path:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise BuildError("no Python headers (Python.h)", "install python3-dev (python3-devel)")
    return include


def pybind11() -> tuple[Path, str]:
    """Include folder and version."""
    root = _find_package("pybind11")
    if root is None or not (root / "include/pybind11/pybind11.h").is_file():
        raise BuildError("pybind11 not found", "pip install pybind11")
    header = (root / "include/pybind11/detail/common.h").read_text()
    numbers = re.findall(r"#\s*define PYBIND11_VERSION_(?:MAJOR|MINOR|MICRO|PATCH)\s+(\w+)", header)
    return root / "include", ".".join(numbers)


# ---- CUDA


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: Capability  # (13, 0)

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"

    @functools.cached_property
    def toolkit(self) -> Path:
        """As nvcc itself sees it: what is on the path may be a wrapper script or a link."""
        top = re.search(r"^#\$ TOP=(.*)$", output_of(self.path, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
        return Path(os.path.realpath(top[1].strip() if top else self.path.resolve().parent.parent))

    def static_runtime(self) -> Path:
        """libcudart_static.a: the library then loads beside a PyTorch without CUDA, too."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (library := self.toolkit / folder / "libcudart_static.a").is_file():
                return library
        raise BuildError(f"libcudart_static.a not found under {self.toolkit}", "install the whole CUDA toolkit")


@functools.cache
def _nvcc_at(path: Path) -> Nvcc | None:
    release = re.search(r"release (\d+)\.(\d+)", output_of(path, "--version"))
    return Nvcc(path, (int(release[1]), int(release[2]))) if release else None


def _nvcc_candidates() -> Iterable[Path]:
    if home := _env.CUDA_HOME() or _env.CUDA_PATH():
        yield Path(home, "bin", "nvcc")  # asked for by name: nothing else will do
        return
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)  # the toolkit from PyPI
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")


def nvcc() -> Nvcc:
    """The nvcc whose major version is that of PyTorch's CUDA; any, for a PyTorch without CUDA."""
    found = [n for n in map(_nvcc_at, _nvcc_candidates()) if n]
    if not found:
        home = _env.CUDA_HOME() or _env.CUDA_PATH()
        where = f" under CUDA_HOME={home}" if home else ""
        raise BuildError(f"nvcc not found{where}", "install the CUDA toolkit, and set CUDA_HOME or PATH to it")
    cuda = torch().cuda
    for candidate in found:
        if not cuda or candidate.version[0] == int(cuda.split(".")[0]):
            return candidate
    raise BuildError(
        f"{found[0]} ({found[0].path}) does not match the CUDA {cuda} of this PyTorch",
        f"set CUDA_HOME to a CUDA {cuda.split('.')[0]} toolkit",
    )


# ---- architectures


def visible_capabilities() -> tuple[Capability, ...]:
    """Compute capabilities of the GPUs, sorted, each once."""
    loaded = sys.modules.get("torch")
    if loaded is not None:
        if not loaded.cuda.is_available():
            return ()
        return tuple(sorted({loaded.cuda.get_device_capability(i) for i in range(loaded.cuda.device_count())}))
    lines = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    numbers = (re.fullmatch(r"(\d+)\.(\d+)", line.strip()) for line in lines)
    return tuple(sorted({(int(n[1]), int(n[2])) for n in numbers if n}))


def archs() -> tuple[str, ...]:
    """What to compile for: TORCH_CUDA_ARCH_LIST, else the visible GPUs, else a default."""
    return parse_archs(_env.ARCH_LIST() or "native")


def parse_archs(text: str) -> tuple[str, ...]:
    """``"8.0;9.0a+PTX"`` -> ``("80", "90a+PTX")``, in the order given, each once.

    ``native`` stands for the visible GPUs. Architectures older than the kernels are left out, since images set long
    lists; BuildError if none remains.
    """
    wanted: list[str] = []
    for word in re.split(r"[;,\s]+", text.strip()):
        if word == "native":
            capabilities = visible_capabilities()
            wanted += [_SPECIFIC_ARCHS.get(c, f"{c[0]}{c[1]}") for c in capabilities] or [ARCH_WITHOUT_GPU]
        elif match := re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", word, re.IGNORECASE):
            wanted.append(match[1] + match[2] + match[3].lower() + ("+PTX" if match[4] else ""))
        else:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: cannot read {word!r}", "write for example 8.0;9.0a+PTX, or native")
    kept = tuple(dict.fromkeys(arch for arch in wanted if _number(arch) >= OLDEST_ARCH))
    if not kept:
        raise BuildError(f"no kernels for compute capability {text}", "the CUDA kernels need 8.0 or newer")
    return kept


def _number(arch: str) -> int:
    return int(re.match(r"\d+", arch)[0])  # type: ignore[index]


def gencode(archs: Iterable[str]) -> list[str]:
    """Flags for nvcc."""
    flags = []
    for arch in archs:
        name = arch.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if name != arch:
            flags += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
    return flags


def fits(archs: Iterable[str], capability: Capability) -> bool:
    """Whether a library compiled for ``archs`` has code that a device of this capability runs."""
    major, minor = capability
    for arch in archs:
        name = arch.removesuffix("+PTX")
        of_major, of_minor = divmod(_number(name), 10)
        same = (of_major, of_minor) == (major, minor)
        family = of_major == major and of_minor <= minor
        newer = (of_major, of_minor) <= (major, minor)
        if same or (family and not name.endswith("a")) or (newer and name != arch and name[-1].isdigit()):
            return True
    return False
