"""The layouts of tests/simt/layouts.py, by which the emulator is tested, are those of CuTe. Needs CUTLASS's headers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch

from simt import toolchain
from simt.layouts import a_registers, address_after, d_elements, matrix_bytes
from simt.selftest_sm90 import Swizzle


def cutlass_include() -> Path | None:
    folders = [Path(os.environ.get("CUTLASS_INCLUDE") or "none")]
    if spec := importlib.util.find_spec("cutlass_library"):
        folders += [Path(p, "source", "include") for p in spec.submodule_search_locations or ()]
    return next((f for f in folders if (f / "cute" / "tensor.hpp").is_file()), None)


WHY_NOT = toolchain.missing() or (
    "" if cutlass_include() else "no CUTLASS: pip install nvidia-cutlass, or CUTLASS_INCLUDE"
)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "all there")


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[int]]:
    """Lines of cute_layouts.cpp by their first two words."""
    program = tmp_path_factory.mktemp("cute") / "layouts"
    cuda = toolchain.cuda_include()
    folders = [cutlass_include(), cuda, Path(cuda, "cccl")]
    include = [word for folder in folders for word in ("-isystem", str(folder))]
    source = toolchain.HERE / "cute_layouts.cpp"
    subprocess.run([toolchain.compiler(), "-std=c++17", "-w", *include, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    words = [line.split() for line in lines if not line.startswith("ERROR")]  # it wants a GPU for an address
    return {(name, int(number)): [int(w) for w in rest] for name, number, *rest in words}


def test_accumulators(cute):
    for n in (64, 80, 128):
        row, column = d_elements(n)
        assert torch.equal((column * 64 + row).flatten(), torch.tensor(cute["d", n]))


def test_a_in_registers(cute):
    element = torch.arange(16)[None, :] * 64 + torch.arange(64)[:, None]
    assert torch.equal(a_registers(element).flatten(), torch.tensor(cute["a", 0]))


@pytest.mark.parametrize("major", ["k", "mn"])
@pytest.mark.parametrize("swizzle", Swizzle)
def test_matrices_and_their_descriptors(cute, swizzle: Swizzle, major: str):
    leading, stride, *want = cute[major, swizzle.span]
    i, j = torch.arange(128)[:, None], torch.arange(16)[None, :]
    got = address_after(swizzle, matrix_bytes(swizzle, major == "mn", i, j, leading, stride))
    assert got.flatten().tolist() == want
