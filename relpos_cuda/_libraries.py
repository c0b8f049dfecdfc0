"""What is compiled: the native libraries as tables of compile units and flags.

    plan    plan*.cpp         -> _plan.<python>.so     pybind11 module, no torch header
    cpu     cpu/*.cpp         -> librelpos_cpu.so      one object per instruction set for the inner loops
    cuda    cuda/*.cu         -> librelpos_cuda.so     static CUDA runtime

The last two use the LibTorch stable ABI only: one binary serves every Python and every PyTorch from the target on.
A new source file is one more name in the tables below.
"""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from . import _env, _toolchain

FILENAMES = {
    "plan": f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}",
    "cpu": "librelpos_cpu.so",
    "cuda": "librelpos_cuda.so",
}
KINDS = tuple(FILENAMES)

PLAN_SOURCES = ("plan.cpp", "plan_attention.cpp", "plan_bindings.cpp")
CPU_SOURCES = ("cpu/logits.cpp", "cpu/attention_fwd.cpp", "cpu/attention_bwd.cpp")
CPU_KERNELS = ("cpu/logits_kernels.cpp", "cpu/attention_kernels.cpp")  # once per instruction set
CPU_PAIR_KERNELS = ("cpu/pair_kernels.cpp",)  # for processors with AVX-512-BF16
CUDA_SOURCES = ("cuda/attention.cu", "cuda/logits.cu", "cuda/table_grad.cu")
CUDA_KERNELS = ("cuda/attention_bwd.cu", "cuda/attention_fwd.cu")  # once per dtype
CUDA_HALVES = ("__half", "__nv_bfloat16")
CUDA_DTYPES = ("float", *CUDA_HALVES)
CUDA_SM90_KERNELS = (
    "cuda/attention_bwd_sm90.cu",
    "cuda/attention_fwd_sm90.cu",
)  # once per dtype of 16 bits, for 90a only
CUDA_HOST_SOURCES = ("plan.cpp", "plan_attention.cpp")

_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden")
STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")  # of PyTorch 2.10
_KERNEL_MATH = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_X86_ISAS = {
    "baseline": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
# Should the compiler link its C++ runtime statically, this one stays private: another in the process has tables of its
# own, of locales for one, and words put together by half of each end in a crash.
_LINK = ("-Wl,--exclude-libs,ALL",)
_OTHER_ISAS: dict[str, tuple[str, ...]] = {"baseline": ()}


@dataclass(frozen=True)
class Unit:
    """One source compiled one way.

    Args:
        source: The file; what it includes with quotes is found from it and from the library's ``include``.
        flags: Compiler flags; part of the cache key.
        variant: Tells the objects of a source that is compiled several times apart.
        compiler: ``cxx`` or ``nvcc``.
    """

    source: Path
    flags: tuple[str, ...] = ()
    variant: str = ""
    compiler: str = "cxx"

    @property
    def object(self) -> str:
        return ".".join(filter(None, (self.source.name, self.variant, "o")))


@dataclass(frozen=True)
class Library:
    """One shared library. Flags and versions are part of the cache key, places are not."""

    title: str  # for people: "the CPU kernels"
    filename: str
    units: tuple[Unit, ...]
    link_flags: tuple[str, ...] = ()
    link_inputs: tuple[str, ...] = ()
    include: tuple[Path, ...] = ()
    system_include: tuple[Path, ...] = ()
    archs: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.filename.split(".")[0].removeprefix("lib").removeprefix("_")


def csrc() -> Path:
    """In the package once installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "plan.h").is_file():
            return folder
    raise _toolchain.BuildError(f"the C++ sources (csrc) are missing beside {package}", "install relpos_cuda again")


def library(kind: str) -> Library:
    """The library of this kind as this machine would build it; BuildError if it cannot."""
    return {"plan": _plan, "cpu": _cpu, "cuda": _cuda}[kind]()


def versions(**more: str) -> dict[str, str]:
    return {"machine": platform.machine(), "c++": _toolchain.version_of(_toolchain.cxx()), **more}


def _plan() -> Library:
    include, version = _toolchain.pybind11()
    flags = (*_COMMON, "-O2", *_env.CXXFLAGS())
    return Library(
        title="the planner",
        filename=FILENAMES["plan"],
        units=tuple(Unit(csrc() / name, flags) for name in PLAN_SOURCES),
        link_flags=_LINK,
        include=(csrc(),),
        system_include=(include, _toolchain.python_include()),
        versions=versions(python=sysconfig.get_config_var("EXT_SUFFIX"), pybind11=version),
    )


def torch_inputs() -> tuple[str, ...]:
    """libtorch, behind the C++ runtime: some builds of libtorch export parts of another one."""
    libraries = ("-lstdc++", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed")
    return (f"-L{_toolchain.torch().lib}", *libraries)


def _cpu() -> Library:
    x86 = platform.machine() in ("x86_64", "AMD64")
    isas = _X86_ISAS if x86 else _OTHER_ISAS
    common = (*_COMMON, *_env.CXXFLAGS())
    dispatching = (*common, "-O3", *STABLE_ABI, *(("-DRELPOS_HAVE_X86_ISAS",) if x86 else ()))
    units = [Unit(csrc() / name, dispatching) for name in CPU_SOURCES]
    for isa, flags in isas.items():
        for name in (*CPU_KERNELS, *(CPU_PAIR_KERNELS if isa == "avx512_bf16" else ())):
            units.append(Unit(csrc() / name, (*common, *_KERNEL_MATH, f"-DRELPOS_ISA={isa}", *flags), isa))
    return Library(
        title="the CPU kernels",
        filename=FILENAMES["cpu"],
        units=tuple(units),
        link_flags=_LINK,
        link_inputs=torch_inputs(),
        include=(csrc(),),
        system_include=(_toolchain.torch().include,),
        versions=versions(),
    )


def _cuda() -> Library:
    nvcc = _toolchain.nvcc()
    archs = _toolchain.archs()
    sm90 = tuple(arch for arch in archs if arch.removesuffix("+PTX") == "90a")
    common = (
        *("-std=c++17", "-O3", *STABLE_ABI, "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", *(("-DRELPOS_SM90A",) if sm90 else ()), *_env.NVCCFLAGS()),
    )
    flags = (*common, *_toolchain.gencode(archs))
    host_flags = (*_COMMON, "-O2", *_env.CXXFLAGS())
    units = [Unit(csrc() / name, flags, compiler="nvcc") for name in CUDA_SOURCES]
    for name in CUDA_KERNELS:  # what compiles longest comes first
        for dtype in CUDA_DTYPES:
            units.insert(0, Unit(csrc() / name, (*flags, f"-DRELPOS_TYPE={dtype}"), dtype.strip("_"), compiler="nvcc"))
    for name in CUDA_SM90_KERNELS if sm90 else ():
        for dtype in CUDA_HALVES:
            own = (*common, *_toolchain.gencode(sm90), f"-DRELPOS_TYPE={dtype}")
            units.append(Unit(csrc() / name, own, dtype.strip("_"), compiler="nvcc"))
    units += [Unit(csrc() / name, host_flags) for name in CUDA_HOST_SOURCES]
    return Library(
        title="the CUDA kernels",
        filename=FILENAMES["cuda"],
        units=tuple(units),
        link_flags=(*_LINK, "-ldl", "-lrt", "-lpthread"),
        # g++ links: nvcc -shared would add a device-link stub for its default architecture.
        link_inputs=(*torch_inputs(), str(nvcc.static_runtime())),
        include=(csrc(),),
        system_include=(_toolchain.torch().include,),
        archs=archs,
        versions=versions(nvcc=str(nvcc)),
    )
