"""The loader: which library is taken, and that one which cannot be had costs a warning and nothing else."""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest

from relpos_cuda import _build, _libraries, _loader, _toolchain
from relpos_cuda._build import BuildError, Unit


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
    path = library_in(
        tmp_path / "prebuilt", "cpu", **({"versions": {"machine": "pdp11"}} if damage == "machine" else {})
    )
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


def test_what_cannot_be_loaded_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library is what the compiler wrote, so the next one would be no better, and others may be using it."""

    def refuse(kind: str, library: Path) -> None:
        raise OSError("cannot allocate static TLS")

    path = library_in(tmp_path / "compiled", "cpu")
    monkeypatch.setattr(_build, "build", lambda kind: path)
    monkeypatch.setattr(_build, "is_as_built", lambda library: library == path)
    monkeypatch.setattr(_loader, "_open", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be loaded: cannot allocate static TLS"):
        assert not _loader.load("cpu")
    assert path.exists()


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
