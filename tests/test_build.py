"""The build: one compile however many processes, any of them killed at any moment; errors that say what to do."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relpos_cuda import _build, _libraries, _ninja
from relpos_cuda._build import BuildError, Unit, build_units

ROOT = Path(__file__).parent.parent

# Builds what the fixture `project` holds and prints its answer; without torch, as setup.py does.
BUILDER = f"""
import ctypes, importlib, sys, types
package = types.ModuleType("machinery")
package.__path__ = [{str(ROOT / "relpos_cuda")!r}]
sys.modules["machinery"] = package
build = importlib.import_module("machinery._build")
from pathlib import Path
units = [build.Unit(Path(sys.argv[1], name), ("-fPIC",)) for name in ("one.cpp", "two.cpp")]
print(ctypes.CDLL(str(build.build_units("tiny", units))).answer(), "torch" in sys.modules)
"""

# A compiler that keeps a diary, takes its time and leaves half an object if it dies young.
SLOW_COMPILER = """#!/bin/sh
case "$*" in
  *" -c "*) ;;
  *) exec c++ "$@" ;;
esac
for object; do :; done
echo "$object" >> "$DIARY"
mkdir "$object.busy" 2>/dev/null || echo "two at once: $object" >> "$DIARY"
echo half > "$object"
sleep "$DELAY"
if [ "$object" = "$DIES_AT" ]; then sh -c "echo Killed >&2; exit 137"; else c++ "$@"; fi
status=$?
rmdir "$object.busy"
exit $status
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources and a header in a folder with an awkward name, an empty cache, a compiler with a diary."""
    folder = tmp_path / "my $HOME project"
    folder.mkdir()
    (folder / "answer.h").write_text("#pragma once\nint six();\n")
    (folder / "one.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return six() * 7; }\n')
    (folder / "two.cpp").write_text('#include "answer.h"\nint six() { return 6; }\n')
    compiler = tmp_path / "slow-c++"
    compiler.write_text(SLOW_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))
    monkeypatch.setenv("DELAY", "0")
    monkeypatch.setenv("RELPOS_CUDA_CACHE_DIR", str(tmp_path / "cache of $USER"))
    monkeypatch.delenv("RELPOS_CUDA_VERBOSE", raising=False)
    return folder


def units_of(project: Path, *flags: str) -> list[Unit]:
    return [Unit(project / name, ("-fPIC", *flags)) for name in ("one.cpp", "two.cpp")]


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def diary() -> list[str]:
    path = Path(os.environ["DIARY"])
    return path.read_text().splitlines() if path.exists() else []


def start_builder(project: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(project)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# ---- many processes, killed processes


def test_many_processes_compile_once(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DELAY", "2")
    builders = [start_builder(project) for _ in range(6)]
    outputs = [builder.communicate(timeout=60) for builder in builders]
    assert [out.split() for out, _ in outputs] == [["42", "False"]] * 6
    assert sorted(diary()) == ["one.cpp.o", "two.cpp.o"]
    said = "".join(err for _, err in outputs)
    assert said.count("compiling tiny") == said.count("compiled tiny in") == 1
    assert said.count("waiting for another process") == 5


@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("moment", [0.1, 0.3, 0.6, 0.9])
def test_killed_at_any_moment(project: Path, monkeypatch: pytest.MonkeyPatch, moment: float, whole_group: bool):
    monkeypatch.setenv("DELAY", "0.4")
    builder = start_builder(project)
    time.sleep(moment)
    (os.killpg if whole_group else os.kill)(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert answer(build_units("tiny", units_of(project))) == 42
    if not whole_group:  # compilers it left behind were waited for
        assert not [line for line in diary() if "two at once" in line]


def test_an_interrupted_build_goes_on_where_it_was(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setenv("DIES_AT", "two.cpp.o")
    with pytest.raises(BuildError, match="(?s)tiny did not compile: .*Killed.*hint: .*MAX_JOBS=1.*full log: "):
        build_units("tiny", units_of(project))
    monkeypatch.delenv("DIES_AT")
    assert answer(build_units("tiny", units_of(project))) == 42
    assert diary() == ["one.cpp.o", "two.cpp.o", "two.cpp.o"]


def test_a_damaged_library_is_told_from_one_that_is_as_built(project: Path):
    units = [Unit(project / name, ("-fPIC",)) for name in ("one.cpp", "two.cpp")]
    library = build_units("tiny", units)
    assert _build.is_as_built(library)
    library.write_bytes(library.read_bytes()[:-1])
    assert not _build.is_as_built(library)
    library.with_suffix(".json").unlink()
    assert not _build.is_as_built(library)


def test_leftovers_do_no_harm(project: Path):
    units = units_of(project)
    built = build_units("tiny", units)
    shutil.rmtree(built.parent)
    work = built.parent / "work"
    work.mkdir(parents=True)
    (built.parent / "lock").write_text("held by process 1\n")
    for name in ("one.cpp.o", ".ninja_log", ".ninja_deps", "build.ninja", "libtiny.so", "one.cpp.o.d"):
        (work / name).write_bytes(b"\x7fELF half")
    assert build_units("tiny", units) == built
    assert answer(built) == 42
    assert sorted(file.name for file in built.parent.iterdir()) == ["libtiny.json", "libtiny.so", "lock"]


def test_sources_edited_while_they_compile(project: Path, monkeypatch: pytest.MonkeyPatch):
    compile_library = _ninja.compile_library

    def edit_and_compile(*args, **kwargs):
        (project / "two.cpp").write_text("int six() { return 60; }\n")
        return compile_library(*args, **kwargs)

    monkeypatch.setattr(_ninja, "compile_library", edit_and_compile)
    units = units_of(project)
    built = build_units("tiny", units)
    assert answer(built) == 420
    assert len(list(built.parent.parent.glob("*/libtiny.so"))) == 1, "none under the key of what it was before"


# ---- what is said


def test_notice_only_after_a_second(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(_build, "NOTICE_AFTER", 30.0)
    build_units("tiny", units_of(project))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(_build, "NOTICE_AFTER", 1.0)
    monkeypatch.setenv("DELAY", "1.2")
    built = build_units("tiny", units_of(project, "-DAGAIN"))
    first, second = capfd.readouterr().err.splitlines()
    assert first == f"relpos_cuda: compiling tiny, once; kept in {built.parent}"
    assert re.fullmatch(r"relpos_cuda: compiled tiny in \d+ s", second)
    build_units("tiny", units_of(project, "-DAGAIN"))
    assert capfd.readouterr().err == ""


def test_first_compiler_error_with_its_place_and_the_log(project: Path):
    (project / "answer.h").write_text("#pragma once\n#warning not this\nint six() { return nonsense; }\n")
    with pytest.raises(BuildError) as caught:
        build_units("tiny", units_of(project, "-Wall"))
    message, log = str(caught.value).splitlines()
    assert re.fullmatch(r"tiny did not compile: .*answer\.h:3:20: error: .*nonsense.* not declared.*", message)
    assert "nonsense" in Path(log.removeprefix("full log: ")).read_text()


def test_missing_source(project: Path):
    with pytest.raises(BuildError, match=r"there is no .*three\.cpp"):
        build_units("tiny", [Unit(project / "three.cpp")])


@pytest.mark.parametrize(
    ("log", "error", "hint"),
    [
        ("a.cpp:1:10: fatal error: Python.h: No such file or directory", "a.cpp:1:10: fatal error", "python3-dev"),
        ("x\na.cu(3): error: identifier\nb.cu(4): error: y", "a.cu(3): error: identifier", ""),
        ("a.cu(3): error #20014-D: no\n", "a.cu(3): error #20014-D: no", ""),
        ("ptxas /tmp/x.ptx, line 9; error   : wgmma", "ptxas /tmp/x.ptx, line 9; error   : wgmma", ""),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_999'", "nvcc fatal", "TORCH_CUDA_ARCH_LIST"),
        ("host_config.h:143:2: error: #error -- unsupported GNU version! gcc", "host_config.h:143:2", "set CXX"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "c++: fatal error: Killed", "MAX_JOBS=1"),
        ("FAILED: a.o\n/tmp/cc.s: fatal error: x: No space left on device", "No space left", "disk is full"),
        ("ld: cannot find -ltorch: No such file or directory", "ld: cannot find -ltorch", "libtorch.so"),
        ("a.o: in function `f':\na.cpp:(.text+0x5): undefined reference to `g()'", "undefined reference to `g()'", ""),
        ("a.cpp:1:1: fatal error: torch/csrc/stable/library.h: No such file", "a.cpp:1:1", "PyTorch 2.10"),
        ("a.h:2: warning: error: not one\nlast words\nninja: build stopped: subcommand failed.", "last words", ""),
        ("", "no output", ""),
    ],
)
def test_logs_are_understood(log: str, error: str, hint: str):
    assert error in _ninja.first_error(log)
    assert hint in _ninja.hint_for(log)
    assert bool(hint) == bool(_ninja.hint_for(log))


def test_full_disk(project: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_build.os, "replace", full)
    with pytest.raises(BuildError, match="(?s)tiny could not be built.*hint: the disk is full"):
        build_units("tiny", units_of(project))


def test_no_compiler_no_ninja(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "ninja", None)
        with pytest.raises(BuildError, match="(?s)ninja not found.*hint: pip install ninja"):
            build_units("tiny", units_of(project))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: CXX=no-such-compiler"):
        build_units("tiny", units_of(project))
    monkeypatch.delenv("CXX")
    with pytest.raises(BuildError, match="(?s)no C\\+\\+ compiler found.*hint: install g\\+\\+"):
        build_units("tiny", units_of(project))


# ---- the key and the cache


def test_what_the_key_depends_on(project: Path, tmp_path: Path):
    def key(folder: Path = project, **changes) -> str:
        options = {"title": "tiny", "filename": "libtiny.so", "units": tuple(units_of(folder)), **changes}
        return _build.key_of(_libraries.Library(**options))

    keys = [
        key(),
        key(units=tuple(units_of(project, "-O1"))),
        key(link_flags=("-lm",)),
        key(archs=("80",)),
        key(archs=("80", "90a")),
        key(versions={"c++": "12"}),
        key(versions={"c++": "13"}),
    ]
    header = project / "answer.h"
    header.write_text(header.read_text() + "// \n")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    moved = shutil.copytree(project, tmp_path / "elsewhere")
    assert key(moved) == keys[-1]
    assert key(title="other words", link_inputs=("/lib/x.so",), system_include=(tmp_path,)) == keys[-1]


def test_cache_that_cannot_be_written(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RELPOS_CUDA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_build.tempfile, "tempdir", str(tmp_path))
    built = build_units("tiny", units_of(project))
    assert build_units("tiny", units_of(project)) == built
    assert answer(built) == 42 and len(diary()) == 2
    folder = built.parent.parent
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert capfd.readouterr().err.count(f"cannot write to {tmp_path}/file/cache (Not a directory); keeping") == 1
    folder.chmod(0o777)  # anybody may have put a library there
    assert _build._private_temporary_folder() != folder


def test_a_library_is_taken_from_a_cache_that_cannot_be_written(project: Path, monkeypatch: pytest.MonkeyPatch):
    built = build_units("tiny", units_of(project))
    monkeypatch.setattr(_build, "_writable_cache", lambda: pytest.fail("asked for"))
    assert build_units("tiny", units_of(project)) == built
    assert json.loads(built.with_suffix(".json").read_text())["flags"]["one.cpp.o"] == ["-fPIC"]
