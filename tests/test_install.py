"""The real libraries, in processes of their own: commands, an installation, no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import relpos_cuda
from relpos_cuda import _self_check

ROOT = Path(__file__).parent.parent


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "relpos_cuda", *arguments, **variables)


USE = """
import torch, relpos_cuda, warnings
warnings.simplefilter("always")
torch.manual_seed(0)
attn, q, h, w = torch.randn(2, 6, 6), torch.randn(2, 6, 8), torch.randn(3, 8), torch.randn(5, 8)
for _ in range(3):
    got = relpos_cuda.add_decomposed_rel_pos(attn, q, h, w, (2, 3), (2, 3))
torch.testing.assert_close(got, relpos_cuda.reference.add_decomposed_rel_pos(attn, q, h, w, (2, 3), (2, 3)))
from relpos_cuda import _loader
print(_loader.status()["cpu"].origin)
"""


def test_without_a_compiler_everything_works_after_one_warning(tmp_path: Path):
    done = python("-c", USE, PATH="", CXX="", RELPOS_CUDA_CACHE_DIR=str(tmp_path))
    assert done.stdout == "failed\n", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "no native CPU library, using the slower PyTorch path: no C++ compiler found" in done.stderr
    assert "hint: install g++" in done.stderr


def test_commands(tmp_path: Path):
    done = command("build", "plan", RELPOS_CUDA_CACHE_DIR=str(tmp_path))
    path = next(tmp_path.glob("plan-*/_plan*.so"))
    assert done.returncode == 0 and done.stdout.split() == ["plan", str(path)]
    assert "-fvisibility=hidden" in done.stderr, "build is verbose"
    done = command("build", "cpu", CXX="no-such-compiler")
    assert done.returncode == 1 and "no-such-compiler" in done.stdout
    done = command("check")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 12 if torch.cuda.is_available() else 6), done.stdout + done.stderr
    assert all(line.endswith("native kernels  ok") for line in lines)
    done = command("info", RELPOS_CUDA_NO_JIT="1", RELPOS_CUDA_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert "RELPOS_CUDA_NO_JIT" in done.stdout and "failed: none was built at installation" in done.stdout
    done = command("info", RELPOS_CUDA_VERBOSE="1")
    if not torch.cuda.is_available():
        assert "not loaded: no GPU is visible" in done.stdout and "nvcc" not in done.stderr
    for plan in ("backward +bfloat16 +logits_bwd", "backward_keys +float32 +attention_bwd_keys"):
        assert re.search(f"90 +SAM-H +global +{plan}", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    "op,function,gradient",
    [("logits", "add_decomposed_rel_pos", "d attn"), ("attention", "rel_pos_attention", "d q")],
)
def test_check_says_what_is_wrong(
    op: str, function: str, gradient: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(x: torch.Tensor, *others: object) -> torch.Tensor:
        return right(x, *others) + 0.1 * (x - x.detach())  # in one gradient only

    right = getattr(relpos_cuda, function)
    monkeypatch.setattr(relpos_cuda, function, wrong)
    assert _self_check.check() == 1
    for line in capsys.readouterr().out.splitlines():
        assert re.search(f"native kernels  {gradient} is off by [^;]+$" if f" {op} " in line else "ok$", line)


@pytest.mark.slow
def test_pip_install(tmp_path: Path):
    """Into a fresh environment that has PyTorch: no download; csrc, libraries, benchmarks in it; works from elsewhere.

    Without build isolation and without an index, because an isolated build fetches setuptools; --ignore-installed,
    because this project may be installed where the packages come from.
    """
    if python("-m", "pip", "--version").returncode:  # asked there: where pip is imported, setuptools cannot be
        pytest.skip("no pip")
    names = ("benchmarks", "csrc", "relpos_cuda", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    tree = tmp_path / "tree"  # setuptools leaves files behind in the tree
    tree.mkdir()
    for path in (ROOT / name for name in names if (ROOT / name).exists()):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tree)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "elsewhere.pth").write_text("\n".join({str(Path(m.__file__).parent.parent) for m in (torch, pytest)}))
    environment = str(tmp_path / "venv" / "bin" / "python")
    started = time.monotonic()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", environment, "install", *options, str(tree)],
        env={**os.environ, "RELPOS_CUDA_BUILD": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 120
    installed = site / "relpos_cuda"
    assert (installed / "csrc" / "cuda" / "logits.cu").is_file() and (installed / "py.typed").is_file()
    assert {f.name for f in (installed / "_prebuilt").iterdir()} >= {"librelpos_cpu.so", "librelpos_cpu.json"}
    variables = {**os.environ, "RELPOS_CUDA_NO_JIT": "1", "PATH": ""}
    code = USE + "print(_loader.plan().__file__, relpos_cuda.__file__)"
    done = subprocess.run([environment, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    origin, plan, package = done.stdout.split()
    assert origin == "prebuilt" and Path(plan).parent == installed / "_prebuilt"
    assert not list(installed.glob("benchmarks/results")) and not list(installed.glob("benchmarks/*probe*"))
    only = "--parts ops --ops attention --cases sam_b_windows --rounds 1 --seconds 0.01"
    measure = ["bench", "--quick", *only.split(" ")]
    command = [environment, "-m", "relpos_cuda", *measure]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "bench" / "bench.json").is_file(), done.stdout + done.stderr
    assert Path(package).parent == installed
