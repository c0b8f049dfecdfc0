"""The CUDA kernels, emulated, under AddressSanitizer with UBSan, and under ThreadSanitizer: not a word from either.

That both do speak up is proven by tests/test_canaries.py, which plants bugs that only they can see.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emulator
from simt import toolchain
from simt.toolchain import ADDRESS, THREAD, Sanitizer

TESTS = {  # file: pytest's -k
    "test_logits.py": "emulated and (tiny or strides or not_finite) and "
    "(ragged or row_1x7 or lanes or video or class or packed or inf)",
    "test_attention.py": "emulated and not float16 and "
    "(lse or tiny and (5x13_mma or 8x8 or video or class_tok or fraction or more or spans))",
    "test_attention_window.py": "emulated and not torch.float16 and test_windows and "
    "(one_line or interpol or finer or video)",
}


@pytest.mark.slow
@pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))
@pytest.mark.parametrize("file", TESTS)
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD], ids=lambda s: s.name)
def test_silence(sanitizer: Sanitizer, file: str):
    library = emulator.build(sanitizer)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", TESTS[file]]
    environment = os.environ | sanitizer.environment | {emulator.INSTEAD: str(library), "SIMT_SCHED": "random"}
    environment |= {"PYTHONPATH": str(emulator.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
