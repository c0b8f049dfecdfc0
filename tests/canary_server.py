"""Runs tests of the emulated kernels once for every planted bug named on standard input, and prints what became of it.

    python canary_server.py EXPRESSION        (pytest's -k; the library is that of emulator.INSTEAD)
    7 tests/test_logits.py::test_...          bug 7 was noticed by this test
    8                                         bug 8 was not

Tests are collected once; every bug gets a fork of that process, so that one may crash, hang or be ended by a sanitizer
without harm to the next. The test that noticed a bug runs first for the next. Bug 0 is none, and should be the first:
it tells how long all tests take, and a bug that makes them take far longer has hung.
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

LIMIT = 5  # times as long as all tests take
AT_LEAST = 10  # seconds


class RunForEveryBug:
    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        self.running = mmap.mmap(-1, 8)  # shared with the forks: the number of the test under way

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        library = ctypes.CDLL(os.environ[emulator.INSTEAD])
        bug_of_library = ctypes.c_int.in_dll(library, "relpos_planted_bug")
        items, limit = session.items, 0  # seconds; 0: none
        for bug in map(int, sys.stdin):
            start, child = time.monotonic(), os.fork()
            if child == 0:
                bug_of_library.value = bug
                signal.alarm(limit)
                os._exit(self.first_failure(session))
            _, status = os.waitpid(child, 0)
            noticed_by = ""
            if status == 0:
                limit = AT_LEAST + int(LIMIT * (time.monotonic() - start))
            else:
                item = items.pop(int.from_bytes(self.running[:8], "little"))
                items.insert(0, item)
                noticed_by = item.nodeid
            print(bug, noticed_by, file=self.answers, flush=True)
        return True

    def first_failure(self, session: pytest.Session) -> int:
        for number, item in enumerate(session.items):
            self.running[:8] = number.to_bytes(8, "little")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if session.testsfailed:
                return 1
        return 0


def main(expression: str) -> int:
    plugin = RunForEveryBug()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", "test_logits.py", "-k", expression]
    return pytest.main(options, plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
