"""Packages of which a test wants one module, and not all that they import."""

from __future__ import annotations

import importlib.util
import sys

import pytest


def bare(*names: str) -> None:
    """Makes them empty packages, parents first, whose submodules are imported as usual."""
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            pytest.skip(f"{name} is not installed")
        sys.modules.setdefault(name, importlib.util.module_from_spec(importlib.util.find_spec(name)))
