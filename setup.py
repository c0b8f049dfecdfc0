"""Puts csrc and benchmarks into the wheel, the former to be compiled on first use, or by RELPOS_CUDA_BUILD already."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent


def build_machinery() -> types.SimpleNamespace:
    """The package's own modules for building, without the package: importing that would need PyTorch."""
    package = types.ModuleType("relpos_cuda_build_machinery")
    package.__path__ = [str(ROOT / "relpos_cuda")]
    sys.modules[package.__name__] = package
    names = ("_build", "_env", "_libraries", "_toolchain")
    return types.SimpleNamespace(**{n[1:]: importlib.import_module(f"{package.__name__}.{n}") for n in names})


MACHINERY = build_machinery()
MODE = MACHINERY.env.BUILD()


def wanted() -> list[str]:
    if MODE == "all":
        return ["plan", "cpu", "cuda"]
    if MODE != "auto":
        return {"0": [], "cpu": ["plan", "cpu"], "cuda": ["plan", "cuda"]}[MODE]
    toolchain = MACHINERY.toolchain
    try:
        toolchain.nvcc()
        cuda = MACHINERY.env.ARCH_LIST.is_set() or bool(toolchain.visible_capabilities())
    except toolchain.BuildError:
        cuda = False
    return ["plan", "cpu", *(["cuda"] if cuda else [])]


def prebuild(kind: str, destination: Path) -> None:
    """Compiles a library into the wheel. Under "auto" a failure is told and left to the first use."""
    scratch = Path(tempfile.mkdtemp(prefix="relpos_cuda-build-"))
    try:
        library = MACHINERY.build.build(kind, cache=scratch)
    except MACHINERY.build.BuildError as error:
        if MODE != "auto":
            raise  # the log it names stays
        print(f"relpos_cuda: the {kind} library will be compiled on first use: {error}", file=sys.stderr)
    else:
        destination.mkdir(parents=True, exist_ok=True)
        for file in library.parent.iterdir():
            if file.suffix in (".so", ".json", ".log"):
                shutil.copy2(file, destination)
        shutil.rmtree(scratch)


def not_for_users(folder: str, names: list[str]) -> set[str]:
    """Of benchmarks: results, and what needs the tests."""
    return {name for name in names if not name.endswith(".py") or "probe" in name}


class BuildPy(build_py):
    editable_mode: bool

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the source tree has csrc, and builds on first use
        package = Path(self.build_lib, "relpos_cuda")
        for folder in ("csrc", "benchmarks", "_prebuilt"):
            shutil.rmtree(package / folder, ignore_errors=True)  # of an earlier build
        shutil.copytree(ROOT / "csrc", package / "csrc")
        shutil.copytree(ROOT / "benchmarks", package / "benchmarks", ignore=not_for_users)
        for kind in wanted():
            prebuild(kind, package / "_prebuilt")

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        files = (f for folder in ("csrc", "benchmarks") for f in (ROOT / folder).rglob("*") if f.is_file())
        return [*super().get_source_files(), *(str(f.relative_to(ROOT)) for f in files)]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return MODE != "0"


options: dict[str, Any] = {"cmdclass": {"build_py": BuildPy}, "distclass": PlatformDistribution}
setup(**options)
