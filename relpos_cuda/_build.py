"""When and where it is compiled: a cache folder per content key, one compiling process at a time.

    <cache>/<name>-<key>/   librelpos_cpu.so    appears whole (rename), then never changes; read without a lock
                            librelpos_cpu.json  digest, archs, flags, versions; there before the library
                            ptxas.log           registers and spills of each kernel (CUDA)
                            work/               objects of a build under way or interrupted, and build.log
                            lock                held by the kernel for a living process: a kill releases it

The key is a hash of sources, quoted headers, flags, versions and architectures; places are not in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import _env, _libraries, _ninja
from ._libraries import Library, Unit
from ._toolchain import BuildError

__all__ = ["BuildError", "Unit", "archs_of", "build", "build_library", "build_units", "sidecar_of"]

NOTICE_AFTER = 1.0  # seconds that need no explanation


def build(kind: str, cache: Path | None = None) -> Path:
    """The library ``"plan"``, ``"cpu"`` or ``"cuda"`` from the cache, compiled if it is not there.

    Raises:
        BuildError: It cannot be built: why, a hint, the log.
    """
    try:
        return build_library(_libraries.library(kind), cache)
    except _env.BadValueError as error:
        raise BuildError(str(error)) from error


def build_units(
    name: str,
    units: Iterable[Unit],
    link_flags: Sequence[str] = (),
    *,
    include: Sequence[Path] = (),
    system_include: Sequence[Path] = (),
    cache: Path | None = None,
) -> Path:
    """Any other shared library, ``lib<name>.so``, in the same way.

    Args:
        include: ``-I`` folders; headers included from them with quotes belong to the cache key.
        system_include: ``-isystem`` folders; not in the key.
        cache: Instead of the user's cache.
    """
    library = Library(
        title=name,
        filename=f"lib{name}.so",
        units=tuple(units),
        link_flags=tuple(link_flags),
        include=tuple(include),
        system_include=tuple(system_include),
        versions=_libraries.versions(),
    )
    return build_library(library, cache)


def build_library(library: Library, cache: Path | None = None) -> Path:
    """The library from the cache, or from ``cache`` instead; compiled if it is not there."""
    try:
        while True:
            key = key_of(library)
            place = Path(f"{library.name}-{key}", library.filename)
            target = (cache or _env.CACHE_DIR()) / place
            if target.is_file():  # even where the cache cannot be written
                return target
            target = (cache or _writable_cache()) / place
            if target.is_file() or _build_locked(library, key, target.parent):
                return target
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = _ninja.hint_for("No space left on device") if full else f"set {_env.CACHE_DIR.name} to another folder"
        raise BuildError(f"{library.title} could not be built: {error}", hint) from error


def _build_locked(library: Library, key: str, home: Path) -> bool:
    """Compiles unless another process does it first. False if the sources changed meanwhile: begin again."""
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home, library) as lock:
        if (home / library.filename).is_file():
            return True
        started = time.monotonic()
        targets = f" for {', '.join(library.archs)}" if library.archs else ""
        with _notice(f"compiling {library.title}{targets}, once; kept in {home}"):
            built = _ninja.compile_library(library, home / "work", lock)
        if key_of(library) != key:
            return False
        _publish(library, key, built, home)
        if (seconds := time.monotonic() - started) > NOTICE_AFTER:
            _say(f"compiled {library.title} in {seconds:.0f} s")
    return True


def _publish(library: Library, key: str, built: Path, home: Path) -> None:
    """Puts the results in place, the library last and each by a rename, so that no reader meets a part of one."""
    work = built.parent
    sidecar = {
        "key": key,
        "sha256": _digest(built),
        "archs": library.archs,
        "flags": {unit.object: unit.flags for unit in library.units},
        "versions": library.versions,
    }
    described = work / _sidecar_path(built).name
    described.write_text(json.dumps(sidecar, indent=1))
    for file in (work / _ninja.PTXAS_LOG, described, built):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # should the rename survive a power cut, so does the content
            os.replace(file, home / file.name)
    shutil.rmtree(work, ignore_errors=True)


# ---- what is in a library


def _sidecar_path(library: Path) -> Path:
    return library.with_name(library.name.split(".")[0] + ".json")


def is_as_built(library: Path) -> bool:
    """Whether the file is still what its compiler wrote."""
    return sidecar_of(library).get("sha256") == _digest(library)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sidecar_of(library: Path) -> dict[str, Any]:
    """Key, archs, flags and versions that a library was built with; empty if it does not say."""
    try:
        described = json.loads(_sidecar_path(library).read_text())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def archs_of(library: Path) -> tuple[str, ...]:
    """GPU architectures a library holds code for."""
    return tuple(sidecar_of(library).get("archs", ()))


# ---- the key


def key_of(library: Library) -> str:
    digest = hashlib.sha256()
    described = [
        library.filename,
        [(unit.object, unit.compiler, unit.flags) for unit in library.units],
        library.link_flags,
        library.archs,
        sorted(library.versions.items()),
    ]
    digest.update(json.dumps(described).encode())
    for file in sources_of(library):
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def sources_of(library: Library) -> list[Path]:
    """The sources and all they include with quotes, in the order met."""
    found: dict[Path, None] = {}
    pending = [unit.source for unit in reversed(library.units)]
    while pending:
        file = Path(os.path.normpath(pending.pop()))
        if file in found:
            continue
        if not file.is_file():
            raise BuildError(f"{library.title}: there is no {file}", "install relpos_cuda again")
        found[file] = None
        for name in re.findall(rb'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', file.read_bytes(), re.MULTILINE):
            places = (folder / os.fsdecode(name) for folder in (file.parent, *library.include))
            pending += [place for place in places if place.is_file()][:1]
    return list(found)


# ---- the cache folder


def _writable_cache() -> Path:
    """The cache, or a folder of this user among the temporary files where it cannot be written."""
    wanted = _env.CACHE_DIR()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        fallback = _private_temporary_folder()
        _say_once(f"cannot write to {wanted} ({error.strerror}); keeping compiled libraries in {fallback}")
        return fallback


def _private_temporary_folder() -> Path:
    """Code is loaded from it: nobody else may be able to write there, or to have made it."""
    folder = Path(tempfile.gettempdir(), f"relpos_cuda-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="relpos_cuda-"))


@contextlib.contextmanager
def _locked(home: Path, library: Library) -> Iterator[int | None]:
    """Waits its turn, unless the library appears meanwhile; then the turn is not needed any more."""
    import fcntl  # not on every platform, and only building needs it

    with (home / "lock").open("ab") as file:
        with _notice(f"waiting for another process that compiles {library.title}"):
            while not (home / library.filename).is_file():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        try:
            yield file.fileno()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough while a compiler's daemon has the file open, too


# ---- what is said, to stderr


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"relpos_cuda: {text}", file=sys.stderr, flush=True)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _say(text)


@contextlib.contextmanager
def _notice(text: str) -> Iterator[None]:
    """Says it if what is done under it takes longer than a moment."""
    timer = threading.Timer(NOTICE_AFTER, _say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
