"""Runs tests of the emulated kernels once for every planted bug named on standard input, and prints what became of it.

    python canary_server.py EXPRESSION FILE...     (pytest's -k; the library is that of emulator.INSTEAD)

    7 test_logits.py                               asked: bug 7, with the tests of these files
    8 test_logits.py test_attention.py
    7 tests/test_logits.py::test_...               answered: bug 7 was noticed by this test
    8                                              bug 8 was not

Tests are collected once; every bug gets a fork of that process, so that one may crash, hang or be ended by a sanitizer
without harm to the next. The tests that noticed most bugs per second of theirs run first. A test that notices its first
bug runs again without any: should it fail then, too, that is answered for bug 0. A test that takes far longer than
before hangs.
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

HANGS = 10  # times as long as before
AT_LEAST, AT_FIRST = 5, 90  # seconds
NO_BUG = 0


class RunForEveryBug:
    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        self.bug = ctypes.c_int.in_dll(ctypes.CDLL(os.environ[emulator.INSTEAD]), "relpos_planted_bug")
        order = list(range(len(self.items)))
        noticed = [0] * len(order)
        # Shared with the forks: the seconds of each test, and behind them which one is under way.
        self.shared = memoryview(mmap.mmap(-1, 8 * (len(order) + 1))).cast("d")
        for line in sys.stdin:
            bug, *files = line.split()
            failed = self.first_failure(int(bug), [n for n in order if self.items[n].path.name in files])
            if failed is not None:
                if not noticed[failed] and self.first_failure(NO_BUG, [failed]) is not None:
                    self.answer(NO_BUG, failed)
                noticed[failed] += 1
            self.answer(int(bug), failed)
            known = [seconds for seconds in self.shared[:-1] if seconds] or [1.0]
            usual = sum(known) / len(known)
            order.sort(key=lambda test: (self.shared[test] or usual) / (noticed[test] + 1))
        return True

    def answer(self, bug: int, test: int | None) -> None:
        print(bug, "" if test is None else self.items[test].nodeid, file=self.answers, flush=True)

    def first_failure(self, bug: int, tests: list[int]) -> int | None:
        """Of these tests in this order, in a fork."""
        child = os.fork()
        if child == 0:
            self.bug.value = bug
            os._exit(self.run(tests))
        _, status = os.waitpid(child, 0)
        return int(self.shared[-1]) if status else None

    def run(self, tests: list[int]) -> int:
        for test in tests:
            self.shared[-1] = test
            signal.alarm(AT_LEAST + int(HANGS * self.shared[test]) if self.shared[test] else AT_FIRST)
            start, item = time.monotonic(), self.items[test]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if item.session.testsfailed:
                return 1
            self.shared[test] = time.monotonic() - start
        return 0


def main(expression: str, *files: str) -> int:
    plugin = RunForEveryBug()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    options = ["-s", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    return pytest.main([*options, *files, "-k", expression], plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
