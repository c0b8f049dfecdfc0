"""The Hopper half of the shim under sanitizers: right kernels are silent, a missing barrier or fence is a race.

A process that loads sanitized code must be started with it, so each run is a process of its own, without PyTorch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simt import toolchain
from test_simt_sm90 import compiled

RIGHT = ["pipeline", "relay", "stmatrix", "ss float16 64 k", "rs bfloat16 64 mn"]

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))


@pytest.fixture(scope="session")
def thread_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("thread"), toolchain.THREAD, "-DWGMMA_N=64")


@pytest.fixture(scope="session")
def address_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("address"), toolchain.ADDRESS, "-DWGMMA_N=64")


def said(
    library: Path, sanitizer: toolchain.Sanitizer, fault: str, kernels: list[str], proxies: int = 2, asynchronous="late"
) -> str:
    command = [sys.executable, "-S", str(toolchain.HERE / "selftest_sm90.py"), str(library), fault, *kernels]
    variables = {"SIMT_PROXY": str(proxies - 1), "SIMT_ASYNC": asynchronous}
    environment = os.environ | sanitizer.environment | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip() or ("" if done.returncode == 0 else f"exit {done.returncode}")


@pytest.mark.parametrize("asynchronous", ["late", "early", "random"])
def test_right_kernels_have_no_race(thread_library: Path, asynchronous: str):
    assert said(thread_library, toolchain.THREAD, "", RIGHT, asynchronous=asynchronous) == ""


def test_right_kernels_stay_inside_their_memory(address_library: Path):
    assert said(address_library, toolchain.ADDRESS, "", RIGHT) == ""


@pytest.mark.parametrize(
    ("kernel", "fault", "asynchronous"),
    [
        ("pipeline", "no wait for a copy", "early"),
        ("pipeline", "overwrites a stage", "early"),
        ("pipeline", "releases early", "late"),
        ("pipeline", "barriers used at once", "early"),
        ("relay", "reads early", "early"),
        ("relay", "overwrites", "early"),
        ("ss float16 64 k", "no fence_proxy_async", "early"),
        ("rs float16 64 mn", "no fence_proxy_async", "late"),
    ],
)
def test_a_fault_is_a_race(thread_library: Path, kernel: str, fault: str, asynchronous: str):
    report = said(thread_library, toolchain.THREAD, fault, [kernel], asynchronous=asynchronous)
    assert "WARNING: ThreadSanitizer: data race" in report


def test_one_proxy_needs_no_fence(thread_library: Path):
    assert said(thread_library, toolchain.THREAD, "no fence_proxy_async", ["ss float16 64 k"], proxies=1) == ""
