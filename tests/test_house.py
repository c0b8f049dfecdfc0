"""The rules of CONTRIBUTING.md that can be counted, how long files and functions may be; and a trap of nvcc."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNEL, OTHER, FUNCTION = 400, 300, 60  # lines; of a function without its docstring
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".sh")


def sources() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in map(ROOT.joinpath, done.stdout.split()) if path.suffix in SUFFIXES and path.is_file()]


def is_of_kernels(path: Path) -> bool:
    return path.suffix == ".cuh" or path.is_relative_to(ROOT / "csrc" / "cpu")


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            length = node.end_lineno - node.lineno + 1
            yield node.name, length - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_length_of_files():
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert {path.name: n for path, n in lengths.items() if n > (KERNEL if is_of_kernels(path) else OTHER)} == {}


def test_length_of_functions():
    found = [(path.name, *function) for path in sources() if path.suffix == ".py" for function in functions(path)]
    assert [function for function in found if function[-1] > FUNCTION] == []


def test_pragmas_of_what_is_discarded_stand_in_braces():
    """nvcc 13.0 silently drops the next loop, too, after `if constexpr (false)` and a pragma; g++ does not."""
    unbraced = re.compile(r"if constexpr \([^{;]*\)\n *#pragma")
    found = [path.name for path in sources() if is_of_kernels(path) and unbraced.search(path.read_text())]
    assert found == []
