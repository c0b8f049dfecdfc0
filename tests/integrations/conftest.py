"""The tests of this folder run in an environment with the other libraries: `make test-integrations`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# torchvision from PyPI is built for CUDA and looks for operators of its own, which a CPU build of PyTorch cannot load.
if torch.version.cuda is None:
    _STAND_IN = torch.library.Library("torchvision", "FRAGMENT")
    _STAND_IN.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _STAND_IN.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# ---- the README's matrix: what a whole run has compared

BEGIN, END = "<!-- models: what make test-integrations has compared -->\n", "<!-- end of models -->"
NOT_IN_CI = ("detectron2",)  # is no package


def matrix() -> str:
    """One row per package: its classes, and in which dtypes an attention layer or a model was compared."""
    import stock

    lines = ["| package | attention classes | compared in |", "|---|---|---|"]
    packages = {package for package, *_ in stock.COMPARED} - {*NOT_IN_CI} - {n for n in sys.modules if "test_" in n}
    for package in sorted(packages):
        rows = [row for row in stock.COMPARED if row[0] == package]
        kinds, dtypes = (", ".join(sorted({row[column] for row in rows})) for column in (1, 2))
        lines.append(f"| {package} | {kinds} | {dtypes} |")
    return "\n".join(lines) + "\n"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Every test of every file has run: then the README must say just that."""
    files = {item.path.name for item in session.items}
    if exitstatus or session.config.option.keyword or len(files) < len(list(Path(__file__).parent.glob("test_*.py"))):
        return
    readme = Path(__file__).parents[2] / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    table, _, tail = rest.partition(END)
    if table == matrix():
        return
    if os.environ.get("RELPOS_WRITE_MATRIX") == "1":
        readme.write_text(head + BEGIN + matrix() + END + tail)
        return
    print(f"\nREADME.md must have, and RELPOS_WRITE_MATRIX=1 writes:\n{matrix()}")
    session.exitstatus = 1
