"""What the build finds on a machine: architectures, nvcc, PyTorch's headers; and the environment variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from relpos_cuda import _env, _toolchain
from relpos_cuda._build import BuildError

ROOT = Path(__file__).parent.parent

# ---- architectures


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.0", ["80"]),
        ("80", ["80"]),
        ("9.0a", ["90a"]),
        ("90A", ["90a"]),
        ("8.0;9.0a+PTX", ["80", "90a+PTX"]),
        ("8.0 8.6,8.9;12.0", ["80", "86", "89", "120"]),
        (" 10.0a;10.0f;100 ", ["100a", "100f", "100"]),
        ("8.0;8.0", ["80"]),
        ("5.2 7.5 8.0 12.0+PTX", ["80", "120+PTX"]),
        ("native", ["90a"]),
        ("native;8.0", ["90a", "80"]),
    ],
)
def test_arch_lists(text: str, archs: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_toolchain, "visible_capabilities", lambda: ())
    assert list(_toolchain.parse_archs(text)) == archs


@pytest.mark.parametrize("text", ["Hopper", "9.x", "9.0b", "80+ptx+PTX", "-1"])
def test_bad_arch_lists(text: str):
    with pytest.raises(BuildError, match=rf"cannot read '{re.escape(text)}'"):
        _toolchain.parse_archs(text)


def test_archs_of_visible_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(_toolchain, "visible_capabilities", lambda: ((7, 5), (8, 9), (9, 0), (12, 1)))
    assert _toolchain.archs() == ("89", "90a", "121a")
    monkeypatch.setattr(_toolchain, "visible_capabilities", lambda: ((7, 5),))
    with pytest.raises(BuildError, match=r"need 8\.0 or newer"):
        _toolchain.archs()


@pytest.mark.parametrize(
    ("archs", "runs_on", "not_on"),
    [
        (["80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        (["86"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["90a"], [(9, 0)], [(8, 0), (10, 0)]),
        (["100a"], [(10, 0)], [(10, 3), (12, 0)]),
        (["100f"], [(10, 0), (10, 3)], [(12, 0)]),
        (["80+PTX"], [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        (["90a+PTX"], [(9, 0)], [(10, 0)]),
        (["80", "90a"], [(8, 6), (9, 0)], [(10, 0)]),
        ([], [], [(9, 0)]),
    ],
)
def test_which_gpu_runs_a_library(archs: list[str], runs_on: list, not_on: list):
    assert all(_toolchain.fits(archs, c) for c in runs_on)
    assert not any(_toolchain.fits(archs, c) for c in not_on)


# ---- compilers and headers


def fake_nvcc(folder: Path, release: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


def test_nvcc_must_be_of_the_cuda_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new = fake_nvcc(tmp_path / "old", "12.9"), fake_nvcc(tmp_path / "new", "13.2")
    monkeypatch.setattr(_toolchain, "torch", lambda: _toolchain.Torch(tmp_path, "2.13.0", "13.0"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(old.parent.parent))
    with pytest.raises(BuildError, match=r"(?s)nvcc 12\.9 .*CUDA 13\.0 of this PyTorch.*hint: .*CUDA 13 toolkit"):
        _toolchain.nvcc()
    monkeypatch.setattr(_toolchain, "_nvcc_candidates", lambda: [old, new])
    assert _toolchain.nvcc().path == new
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=f"nvcc not found under CUDA_HOME={tmp_path}"):
        _toolchain.nvcc()


def test_torch_is_found_though_pip_hides_it():
    """An isolated build of pip sees no installed package; ``-S`` hides them as well."""
    code = f"""
import importlib, sys, types
package = types.ModuleType("machinery")
package.__path__ = [{str(ROOT / "relpos_cuda")!r}]
sys.modules["machinery"] = package
toolchain = importlib.import_module("machinery._toolchain")
assert importlib.util.find_spec("torch") is None
found = toolchain.torch()
print(found.root, found.version, found.cuda)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    want = f"{Path(torch.__file__).parent} {torch.__version__} {torch.version.cuda or ''}"
    assert done.stdout.strip() == want.strip(), done.stderr


@pytest.mark.parametrize("has_headers", [False, True])
def test_old_or_bare_torch(has_headers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "version.py").write_text("__version__ = '2.4.1+cu121'\ncuda: Optional[str] = '12.1'\nhip = None\n")
    if has_headers:
        (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
        (tmp_path / "include/torch/csrc/stable/library.h").touch()
    monkeypatch.setattr(_toolchain, "_find_package", lambda name: tmp_path)
    find = _toolchain.torch.__wrapped__
    if has_headers:
        assert (find().version, find().cuda) == ("2.4.1+cu121", "12.1")
    else:
        with pytest.raises(BuildError, match=r"PyTorch 2\.4\.1\+cu121 has no stable-ABI(?s:.*)2\.10 or newer"):
            find()


# ---- environment variables


def test_every_variable_is_listed():
    listed = {variable.name for variable in _env.ALL}
    files = [f for folder in ("relpos_cuda", "csrc") for f in (ROOT / folder).rglob("*") if f.is_file()]
    read = {name for f in files if f.suffix != ".pyc" for name in re.findall(r"\bRELPOS_CUDA_[A-Z_]+\b", f.read_text())}
    macros = {"RELPOS_CUDA_CHECK"}  # of csrc/cuda
    assert read - macros == {name for name in listed if name.startswith("RELPOS_CUDA_")}
    rows = _env.markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [variable.name for variable in _env.ALL]


@pytest.mark.parametrize(
    ("name", "text"), [("VERBOSE", "maybe"), ("BUILD", "gpu"), ("MAX_JOBS", "0"), ("CPU_ISA", "sse")]
)
def test_bad_values_name_the_variable(name: str, text: str, monkeypatch: pytest.MonkeyPatch):
    variable = getattr(_env, name)
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ValueError, match=f"{variable.name}='{text}': wanted"):
        variable()


@pytest.mark.parametrize("name", ["MAX_JOBS", "RELPOS_CUDA_CXXFLAGS", "RELPOS_CUDA_CPU_ISA"])
def test_bad_values_cost_speed_and_no_result(name: str, tmp_path: Path):
    """What is read while building, by the kernels, or set for other tools: a warning, and the PyTorch path."""
    environment = os.environ | {"RELPOS_CUDA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), name: '"0'}
    code = "import torch, relpos_cuda; x = torch.ones(1, 4, 8); t = torch.ones(3, 8)\n"
    code += "print(relpos_cuda.rel_pos_attention(x, x, x, t, t, (2, 2), (2, 2)).sum().item())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "32.0", done.stderr
    assert f"no native CPU library, using the slower PyTorch path: {name}='\"0': " in done.stderr


def test_cache_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RELPOS_CUDA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert _env.CACHE_DIR() == Path("/x/relpos_cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/h")
    assert _env.CACHE_DIR() == Path("/h/.cache/relpos_cuda")
    monkeypatch.setenv("RELPOS_CUDA_CACHE_DIR", "~/c")
    assert _env.CACHE_DIR() == Path("/h/c")
