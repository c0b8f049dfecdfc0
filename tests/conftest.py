"""Devices that tests run on: the CPU, an emulated GPU (the CUDA kernels, run by tests/simt), a GPU if there is one."""

from __future__ import annotations

import os

import pytest
import torch

import emulator
from relpos_cuda import _fallback_attention, _ops

# First, so that no worker of pytest-xdist is left with one of them at the end; then the others by name.
LONGEST = [f"test_{name}.py" for name in ("canaries", "sass", "attention", "bench", "logits", "install")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_logfinish() -> None:
    """An error that CUDA does not recover from ends a worker of pytest-xdist: another takes the tests that are left."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the torch device; under "emulated", CPU tensors go through the CUDA launchers and kernels."""
    return use_device(request.param, monkeypatch)


@pytest.fixture(params=["cpu", "cuda"])
def real_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_device(request.param, monkeypatch)


def use_device(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name == "emulated":
        emulator.use(monkeypatch)
        return "cpu"
    if name == "pytorch":
        use_pytorch(monkeypatch)
        return "cpu"
    return name


def use_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention in plain PyTorch, wherever it is."""
    for name in ("attention_fwd", "attention_bwd"):
        monkeypatch.setattr(_ops, name, getattr(_fallback_attention, name))


@pytest.fixture
def one_thread():
    """Tensors are tiny: on a busy machine, threads that wait for each other take ten times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
