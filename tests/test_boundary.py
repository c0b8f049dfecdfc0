"""What an op throws arrives in Python with its words, whatever C++ runtime the compiler links, and nothing is lost."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from relpos_cuda import _build, _libraries, _loader, _ops, _toolchain, tables

SOURCE = """
#include "boundary.h"
#include "checks.h"
#include "cpu/parallel.h"

namespace relpos {
namespace {
void refuse(const Tensor& t, int64_t n) {
  RELPOS_CHECK(t.numel() < n, "wanted fewer than ", n, " elements, got ", t.numel());
}
void refuse_in_parallel(const Tensor& t, int64_t n) {
  parallel_for(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) RELPOS_CHECK(i < n, "task ", i < n ? i : n);
  });
}
STABLE_TORCH_LIBRARY(boundary, m) {
  m.def("refuse(Tensor t, int n) -> ()");
  m.def("refuse_in_parallel(Tensor t, int n) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(boundary, CPU, m) {
  m.impl("refuse", boxed<&refuse>);
  m.impl("refuse_in_parallel", boxed<&refuse_in_parallel>);
}
}  // namespace
}  // namespace relpos
"""

# In a process of its own, which may end.
CALLER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.set_num_threads(2)
for op in (torch.ops.boundary.refuse, torch.ops.boundary.refuse_in_parallel):
    op(torch.ones(5), 99)
    for n in (4, 5):
        try:
            op(torch.ones(5), n)
        except RuntimeError as error:
            print(str(error).partition("relpos_cuda: ")[2])
"""


@pytest.mark.parametrize("runtime", ["", "-static-libstdc++ -static-libgcc"])
def test_any_cxx_runtime(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = _toolchain.cxx()
    if runtime and _toolchain.output_of(*compiler, "-print-file-name=libstdc++.a").strip() == "libstdc++.a":
        pytest.skip("no static C++ runtime")
    monkeypatch.setenv("CXX", " ".join([*compiler, runtime]))
    source = tmp_path / "boundary.cpp"
    source.write_text(SOURCE)
    flags = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-O1", *_libraries.STABLE_ABI)
    library = dataclasses.replace(_libraries.library("cpu"), units=(_build.Unit(source, flags),))
    if runtime:  # even if there is no other
        library = dataclasses.replace(library, link_inputs=("-l:libstdc++.a", *library.link_inputs))
    path = _build.build_library(library, tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", CALLER, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = [f"wanted fewer than {n} elements, got 5" for n in (4, 5)]
    assert done.stdout.splitlines() == [*wanted, "task 4", "task 5"]


def test_symbols_of_the_cxx_runtime_are_its_own():
    """Parts of another one, which some builds of libtorch export, are found after it."""
    assert _loader.load("cpu")
    said = _toolchain.output_of("readelf", "-d", _loader.status()["cpu"].path)
    needed = re.findall(r"\(NEEDED\).*\[(\w+)", said)
    if not needed:
        pytest.skip("no readelf")
    assert "libstdc" not in needed or needed.index("libstdc") < needed.index("libtorch")


def test_refused_tensors_are_released():
    grid, tokens = (3, 4), (1, 2, 12, 8)
    arguments = [torch.zeros(tokens), torch.zeros(2, 12), *(torch.zeros(tokens) for _ in range(3)), torch.zeros(12, 8)]
    arguments[3] = arguments[3][:, :, 1:]
    storages = [t.untyped_storage() for t in arguments]
    index = tables.lookup(grid, grid, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="k must have 12 tokens, got 11"):
        _ops.attention_fwd(*arguments, index, grid, grid, 0, 1.0)
    del arguments
    assert [torch._C._storage_Use_Count(s._cdata) for s in storages] == [1] * 6
