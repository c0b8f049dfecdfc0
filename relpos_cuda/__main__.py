"""``python -m relpos_cuda info | build | check | bench | demo``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import relpos_cuda

from . import _build, _env, _libraries, _report, _self_check


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m relpos_cuda", description=relpos_cuda.__doc__)
    parser.add_argument("--version", action="version", version=f"relpos_cuda {relpos_cuda.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, found, built and planned")
    build = commands.add_parser("build", help="compile the native libraries now")
    build.add_argument("kind", nargs="?", choices=[*_libraries.KINDS, "all"], default="all")
    commands.add_parser("check", help="compare the kernels with the formula on every device")
    commands.add_parser("bench", help="measure against every other way; takes arguments of its own", add_help=False)
    commands.add_parser("demo", help="see them at work; takes arguments of its own", add_help=False)
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from . import demo

        return demo.main(others) or 0
    if arguments.command == "bench":
        return bench()(others)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if arguments.command == "build":
        return build_now(_libraries.KINDS if arguments.kind == "all" else [arguments.kind])
    return _report.info() if arguments.command == "info" else _self_check.check()


def bench() -> Callable[[list[str]], int]:
    """Of the package `benchmarks`: in this one once installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    name = "relpos_cuda.benchmarks.run"
    if not (package / "benchmarks").is_dir():
        sys.path.insert(1, str(package.parent))
        name = "benchmarks.run"
    return importlib.import_module(name).main  # type: ignore[no-any-return]


def build_now(kinds: Iterable[str]) -> int:
    os.environ[_env.VERBOSE.name] = "1"
    failed = 0
    for kind in kinds:
        try:
            print(f"{kind:6} {_build.build(kind)}")
        except _build.BuildError as error:
            print(f"{kind:6} not built: {error}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
