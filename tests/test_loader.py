"""The loader: which library is taken, and that one which cannot be had costs a warning and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from relpos_cuda import _build, _libraries, _loader, _toolchain
from relpos_cuda._build import BuildError, Unit

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing loaded, nothing prebuilt, no GPU, and a record of what gets opened."""
    monkeypatch.setattr(_loader, "_states", {})
    monkeypatch.setattr(_loader, "_PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(_toolchain, "visible_capabilities", lambda: ())
    for name in ("STRICT", "DISABLE", "NO_JIT"):
        monkeypatch.delenv(f"RELPOS_CUDA_{name}", raising=False)


def fail(kind: str) -> Path:
    raise BuildError("no luck", "try harder")


def library_in(folder: Path, kind: str, **sidecar: object) -> Path:
    """A library that loads, with a sidecar, as an installation or the cache has it."""
    source = folder.parent / "empty.cpp"
    source.write_text("int nothing;\n")
    built = _build.build_units("empty", [Unit(source, ("-fPIC",))], cache=folder.parent / "cache")
    folder.mkdir(exist_ok=True)
    described = {"versions": _libraries.versions(), **sidecar}
    (folder / f"librelpos_{kind}.json").write_text(_build.json.dumps(described))
    return Path(shutil.copy(built, folder / f"librelpos_{kind}.so"))


# ---- what happens on failure


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_one_warning_says_why(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "build", fail)
    with pytest.warns(RuntimeWarning, match="(?s)using the slower PyTorch path: no luck\nhint: try harder") as caught:
        assert not _loader.load(kind)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _loader.load(kind)
    assert str(_loader.status()[kind]) == "failed: no luck\nhint: try harder"


def test_planner_that_cannot_be_had_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "build", fail)
    with pytest.warns(RuntimeWarning, match="no native planner"):
        assert _loader.plan() is None


def test_strict_raises_every_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "build", fail)
    monkeypatch.setenv("RELPOS_CUDA_STRICT", "1")
    for _ in range(2):
        with pytest.raises(BuildError, match="no luck"):
            _loader.load("cpu")


def test_disabled_is_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "build", fail)
    monkeypatch.setenv("RELPOS_CUDA_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _loader.load("cpu") and not _loader.load("cuda") and _loader.plan() is None
    assert str(_loader.status()["cpu"]) == "disabled: RELPOS_CUDA_DISABLE is set"


def test_no_jit_never_compiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "build", lambda kind: pytest.fail("compiled"))
    monkeypatch.setenv("RELPOS_CUDA_NO_JIT", "1")
    with pytest.warns(RuntimeWarning, match="RELPOS_CUDA_NO_JIT is set"):
        assert not _loader.load("cpu")


# ---- which library


def test_prebuilt_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "build", fail)
    path = library_in(tmp_path / "prebuilt", "cpu")
    assert _loader.load("cpu")
    assert str(_loader.status()["cpu"]) == f"prebuilt: {path}"


@pytest.mark.parametrize(("gpus", "origin"), [([], "prebuilt"), ([(8, 6)], "prebuilt"), ([(8, 0), (9, 0)], "compiled")])
def test_prebuilt_only_if_every_gpu_runs_it(gpus: list, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library_in(tmp_path / "prebuilt", "cuda", archs=["80"])
    compiled = library_in(tmp_path / "compiled", "cuda", archs=["80", "90a"])
    monkeypatch.setattr(_build, "build", lambda kind: compiled)
    monkeypatch.setattr(_toolchain, "visible_capabilities", lambda: gpus)
    assert _loader.load("cuda")
    assert _loader.status()["cuda"].origin == origin


@pytest.mark.parametrize("damage", ["content", "machine", "sidecar"])
def test_useless_prebuilt_is_passed_over(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = library_in(tmp_path / "prebuilt", "cpu", **({"versions": {"machine": "pdp11"}} if damage == "machine" else {}))
    compiled = library_in(tmp_path / "compiled", "cpu")
    if damage == "content":
        path.write_bytes(b"no ELF")
    if damage == "sidecar":
        path.with_suffix(".json").write_text("{")
    monkeypatch.setattr(_build, "build", lambda kind: compiled)
    assert _loader.load("cpu")
    assert str(_loader.status()["cpu"]) == f"compiled: {compiled}"


def test_compiled_for_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = library_in(tmp_path / "compiled", "cuda", archs=["80"])
    monkeypatch.setattr(_build, "build", lambda kind: compiled)
    monkeypatch.setattr(_toolchain, "visible_capabilities", lambda: [(9, 0)])
    expected = r"(?s)compiled for 80, which does not run on .* 9\.0.*hint: add it to TORCH_CUDA_ARCH_LIST"
    with pytest.warns(RuntimeWarning, match=expected):
        assert not _loader.load("cuda")


def test_damaged_cache_is_compiled_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "compiled" / "librelpos_cpu.so"
    asked = []

    def build(kind: str) -> Path:
        asked.append(kind)
        if not path.exists():
            library_in(path.parent, kind)
        return path

    build("cpu").write_bytes(b"")
    monkeypatch.setattr(_build, "build", build)
    assert _loader.load("cpu") and asked == ["cpu"] * 3


# ---- threads and forks


def test_threads_load_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled, calls, results = library_in(tmp_path / "compiled", "cpu"), [], []

    def build(kind: str) -> Path:
        calls.append(kind)
        time.sleep(0.2)
        return compiled

    monkeypatch.setattr(_build, "build", build)
    threads = [threading.Thread(target=lambda: results.append(_loader.load("cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8 and calls == ["cpu"]


def test_fork_while_a_thread_loads():
    held, release = threading.Event(), threading.Event()

    def hold():
        with _loader._lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if _loader._lock.acquire(timeout=5) else 1)
    release.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


# ---- the real libraries, in processes of their own


def python(code: str, *, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **variables},
        capture_output=True,
        text=True,
    )


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relpos_cuda", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


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
    done = python(USE, PATH="", CXX="", RELPOS_CUDA_CACHE_DIR=str(tmp_path))
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
    assert (done.returncode, done.stdout.count("native kernels  ok")) == (0, 3), done.stdout + done.stderr
    done = command("info", RELPOS_CUDA_NO_JIT="1", RELPOS_CUDA_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert "RELPOS_CUDA_NO_JIT" in done.stdout and "failed: none was built at installation" in done.stdout
    done = command("info")
    assert re.search(r"90 +SAM-H +global +backward +bfloat16 +logits_bwd", done.stdout), done.stdout + done.stderr


def nvcc_missing() -> bool:
    try:
        _toolchain.nvcc()
    except BuildError:
        return True
    return False


ARCHS = ("80", "86", "89", "90a", "100", "120")


@pytest.mark.slow
@pytest.mark.skipif(nvcc_missing(), reason="no nvcc")
def test_cuda_library_for_every_arch(monkeypatch: pytest.MonkeyPatch):
    """Builds without a GPU, loads beside any PyTorch, and no kernel spills registers."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(ARCHS))
    library = _build.build("cuda")
    assert _build.archs_of(library) == ARCHS
    report = (library.parent / "ptxas.log").read_text()
    assert set(re.findall(r"for 'sm_(\w+)'", report)) == set(ARCHS)
    spilling, kernel = [], ""
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = " ".join(entry.groups())
        if (spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and any(map(int, spills.groups())):
            spilling.append(f"{kernel}: {line.strip()}")
    assert not spilling
    code = f"""
        import torch, relpos_cuda
        torch.ops.load_library({str(library)!r})
        for op in relpos_cuda._ops.SCHEMAS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key("relpos_cuda::" + op, "CUDA"), op
    """
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pip_install(tmp_path: Path):
    """Into a fresh environment that has PyTorch: no download, csrc and libraries in the wheel, works from elsewhere.

    Without build isolation and without an index, because an isolated build fetches setuptools; --ignore-installed,
    because this project may be installed where the packages come from.
    """
    names = ("csrc", "relpos_cuda", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    tree = tmp_path / "tree"  # setuptools leaves files behind in the tree
    tree.mkdir()
    for path in (ROOT / name for name in names if (ROOT / name).exists()):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tree)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "elsewhere.pth").write_text(str(Path(torch.__file__).parent.parent))
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
    assert (installed / "csrc" / "cuda" / "logits.cu").is_file()
    assert {f.name for f in (installed / "_prebuilt").iterdir()} >= {"librelpos_cpu.so", "librelpos_cpu.json"}
    variables = {**os.environ, "RELPOS_CUDA_NO_JIT": "1", "PATH": ""}
    code = USE + "print(_loader.plan().__file__, relpos_cuda.__file__)"
    done = subprocess.run([environment, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    origin, plan, package = done.stdout.split()
    assert origin == "prebuilt" and Path(plan).parent == installed / "_prebuilt"
    assert Path(package).parent == installed
