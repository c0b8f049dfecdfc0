"""Runs tests of the emulated kernels once for every planted bug named on standard input, and prints what became of it.

    python canary_server.py EXPRESSION FILE...     (pytest's -k; the library is that of emulator.INSTEAD)

    7 test_logits.py                               asked: bug 7, with the tests of these files
    8 test_logits.py test_attention.py
    7 tests/test_logits.py::test_...               answered: bug 7 was noticed by this test
    8                                              bug 8 was not

Tests are collected once; every bug gets a fork of that process, so that one may crash, hang or be ended by a sanitizer
without harm to the next. The tests that noticed most bugs per second of theirs run first. Bug 0 is none, and must come
first: it tells how long each test takes, and a test that then takes far longer hangs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time

import pytest
import torch  # noqa: F401  # before the library, which needs its symbols

import emulator

HANGS = 10  # times as long as without a bug
AT_LEAST = 5  # seconds


class RunForEveryBug:
    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        library = ctypes.CDLL(os.environ[emulator.INSTEAD])
        bug_of_library = ctypes.c_int.in_dll(library, "relpos_planted_bug")
        order = list(range(len(session.items)))
        noticed = [0] * len(order)
        # Shared with the forks: the seconds of each test, and behind them which one is under way.
        shared = memoryview(mmap.mmap(-1, 8 * (len(order) + 1))).cast("d")
        for line in sys.stdin:
            bug, *files = line.split()
            child = os.fork()
            if child == 0:
                bug_of_library.value = int(bug)
                asked = [number for number in order if session.items[number].path.name in files]
                os._exit(self.first_failure(session, asked, shared))
            _, status = os.waitpid(child, 0)
            noticed_by = ""
            if status:
                number = int(shared[-1])
                noticed[number] += 1
                noticed_by = session.items[number].nodeid
            order.sort(key=lambda test: shared[test] / (noticed[test] + 1))
            print(bug, noticed_by, file=self.answers, flush=True)
        return True

    def first_failure(self, session: pytest.Session, order: list[int], shared: memoryview) -> int:
        for number in order:
            shared[-1] = number
            if shared[number]:
                signal.alarm(AT_LEAST + int(HANGS * shared[number]))
            start, item = time.monotonic(), session.items[number]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if session.testsfailed:
                return 1
            shared[number] = time.monotonic() - start
        return 0


def main(expression: str, *files: str) -> int:
    plugin = RunForEveryBug()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    options = ["-s", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    return pytest.main([*options, *files, "-k", expression], plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
