"""The CUDA kernels, emulated, under sanitizers: right ones are silent; and of planted bugs the tests notice every one.

The real kernels are broken in one place at a time (tests/planting.py):

    barriers, and what one thread is to do ─▶ ThreadSanitizer
    all others ──▶ plain ──survivors──▶ AddressSanitizer ──survivors──▶ longer tests ──▶ ThreadSanitizer ──▶ explain!

The tests of a bug are those of the ops that have its file in their kernels; the one that notices first ends them.
A survivor fails the test: write one that notices it, or list it in harmless.py with the reason why it is no bug. A
kernel that is right whatever is planted there may have code too many: look at that first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import canary_server
import emulator
import planting
from checks import EVERYTHING
from harmless import HARMLESS
from simt import toolchain
from simt.toolchain import ADDRESS, PLAIN, THREAD, Sanitizer

NAMES = "tiny or misaligned or table_gradients or finite or asked"
SMALL = "5x13_mma or 8x8 or video or class_tok or fraction or more or fewer or spans"  # D as emulator.FEW_KERNELS
WINDOWS = "one_line or interpol or one_pass or finer or video"
FORWARD = "line_of_8 or class_token or many_queries or four_queries or too_many_and"
OF_SM90 = (
    "line_of_33 or round_the or ragged or interpol or two_blocks or past_the_end or two_spans- or video "
    "or no_box or line_of_100 or class_token"
)
SOON = {  # file: pytest's -k, together with RUN
    "test_logits.py": f"({NAMES}) and not (longer or one_row)",
    "test_attention.py": f"lse or asked or saved or tiny and ({SMALL})",
    "test_attention_window.py": "asked or two_kernels and (interpol or finer) "
    f"or test_windows and ({WINDOWS}) or test_forward and ({FORWARD})",
    "test_attention_sm90.py": f"layouts or which_kernels or test_values and ({OF_SM90})",
}
SANITIZED = SOON | {
    "test_attention.py": "tiny and (torch.bfloat16 and (5x13_mma or video_cls or class_tok or spans_of or fraction) "
    "or torch.float32 and (5x13_mma or two_class))",
    "test_attention_window.py": "torch.bfloat16 and "
    "(test_windows and (interpol or finer or video) or test_forward and (line_of_8 or class_token or many_queries))",
    "test_attention_sm90.py": "test_values and torch.bfloat16 and "
    "(round_the or two_spans- or two_blocks or no_box or class_tokens)",
}
SILENT = (SOON if EVERYTHING else SANITIZED) | {
    "test_logits.py": "(tiny or strides or not_finite) and "
    "(ragged or row_1x7 or lanes or video or class or packed or inf)",
    "test_attention_window.py": "test_windows and (one_line or interpol or finer or video) "
    f"or test_forward and ({FORWARD})",
}
LATER = {
    "test_logits.py": "random or strides or tiny and (longer or one_row)",
    "test_attention.py": f"large_bias or huge or whole_table or scale or saved or tiny and ({SMALL} or axes)",
    "test_attention_layouts.py": "strides",
    "test_long_sums.py": "many",
    "test_attention_window.py": f"extremes or packed or {WINDOWS} or 13x13",
    "test_attention_sm90.py": f"extremes or layouts or other or {OF_SM90}",
}
RUN = "emulated and not torch.float16"  # emulator.FEW_KERNELS have none
ONE_IN = {"barriers": 1 if EVERYTHING else 4, "others": 1 if EVERYTHING else 30}  # of every file
LATE = re.compile("cp_async|wgmma")
ONE_THREAD = re.compile(r"(?:threadIdx\.x|lane)(?: % \d+)? == 0")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))]


def matches(key: str, bug: planting.Bug) -> bool:
    slip, _, part_of_line = key.partition(" | ")
    return slip == f"{bug.file}: {bug.original} -> {bug.slip}" and part_of_line in bug.context


def is_harmless(bug: planting.Bug) -> bool:
    return any(matches(key, bug) for key in HARMLESS)


def is_race(bug: planting.Bug) -> bool:
    """For ThreadSanitizer; but that waits for copies and products are missing is seen without it, and only so."""
    if bug.slip == planting.LEFT_OUT:
        return not LATE.search(bug.original)
    return bug.slip == "true" and bool(ONE_THREAD.fullmatch(bug.original))


def asked_about(bugs: dict[int, planting.Bug]) -> Iterator[tuple[int, planting.Bug]]:
    """Of every file the first of a kind, and then each ONE_IN-th."""
    met: Counter[tuple[str, str]] = Counter()
    for number, bug in bugs.items():
        kind = "barriers" if bug.slip == planting.LEFT_OUT else "others"
        if met[bug.file, kind] % ONE_IN[kind] == 0:
            yield number, bug
        met[bug.file, kind] += 1


def noticed_by(library: Path, sanitizer: Sanitizer, tests: dict[str, str], bugs: Iterable[int]) -> dict[int, str]:
    """The test that noticed each bug, or nothing; servers share them."""
    environment = os.environ | sanitizer.environment
    environment |= {emulator.INSTEAD: str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(planting.ROOT)}
    expression = " or ".join(f"{file} and ({of_file})" for file, of_file in tests.items())
    command = [sys.executable, "canary_server.py", f"{RUN} and ({expression})", *tests]
    bugs = list(bugs)
    servers = min(os.cpu_count() or 1, 1 + len(bugs) // 10)
    planted = planting.bugs()

    def files_of(bug: int) -> list[str]:
        """What both ops share is tested enough by the first file of each."""
        where = planted[bug - 1].file
        ops, of_sm90 = planting.ops_of(where), "sm90" in where
        of_any = [file for file in tests if not file.startswith(("test_logits", "test_attention"))]
        if len(ops) > 1:
            return [f"test_{op}.py" for op in ops] + of_any
        return of_any + [file for file in tests if file.startswith(f"test_{ops[0]}") and ("sm90" in file) == of_sm90]

    def ask(mine: list[int]) -> str:
        asked = "\n".join(" ".join([str(bug), *files_of(bug)]) for bug in mine)
        folder = Path(__file__).parent
        return subprocess.run(command, input=asked, cwd=folder, env=environment, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(servers) as pool:
        lines = "".join(pool.map(ask, (bugs[i::servers] for i in range(servers)))).splitlines()
    answers = [(int(number), test) for number, _, test in (line.partition(" ") for line in lines)]
    fail = [test for bug, test in answers if bug == canary_server.NO_BUG]
    assert not fail, f"without a bug, too: {fail}"
    assert sorted(bug for bug, _ in answers) == sorted(bugs), "a server did not answer"
    return dict(answers)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Sanitizer, Path]:
    """With every bug in them, each under a number."""
    root = tmp_path_factory.mktemp("planted")
    flags = [*planting.plant(root), *emulator.FEW_KERNELS]

    def compile_with(sanitizer: Sanitizer) -> Path:
        return emulator.compile_tree(root, root / f"{sanitizer.name}.so", sanitizer, *flags)

    sanitizers = [ADDRESS, PLAIN, THREAD]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(sanitizers, pool.map(compile_with, sanitizers), strict=True))


@pytest.mark.parametrize("file", SILENT)
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD], ids=lambda s: s.name)
def test_silence(libraries: dict[Sanitizer, Path], sanitizer: Sanitizer, file: str):
    """Without a bug, under a schedule at random: not a word."""
    expression = f"{RUN} and ({SILENT[file]})"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", expression]
    environment = os.environ | sanitizer.environment | {emulator.INSTEAD: str(libraries[sanitizer])}
    environment |= {"SIMT_SCHED": "random", "PYTHONPATH": str(planting.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_every_planted_bug_is_noticed(libraries: dict[Sanitizer, Path], capsys: pytest.CaptureFixture[str]):
    bugs = {n: bug for n, bug in enumerate(planting.bugs(), 1) if not is_harmless(bug)}
    planted = dict(asked_about(bugs))
    races = [n for n, bug in planted.items() if is_race(bug)]
    others = [n for n in planted if n not in races]
    counts = {sanitizer: 0 for sanitizer in libraries}

    def survivors_of(bugs: list[int], sanitizer: Sanitizer, tests: dict[str, str]) -> list[int]:
        answers = noticed_by(libraries[sanitizer], sanitizer, tests, bugs) if bugs else {}
        counts[sanitizer] += sum(map(bool, answers.values()))
        return [bug for bug, test in answers.items() if not test]

    others = survivors_of(survivors_of(others, PLAIN, SOON), ADDRESS, SANITIZED)
    left = survivors_of(survivors_of(others, PLAIN, LATER) + races, THREAD, SANITIZED)
    noticed = len(planted) - len(left)
    with capsys.disabled():
        by = ", ".join(f"{count} by {sanitizer.name}" for sanitizer, count in counts.items())
        print(f"\n{noticed} of {len(planted)} planted bugs noticed ({noticed / len(planted):.1%}): {by}")
        harmless, waiting = sum(map(is_harmless, planting.bugs())), len(bugs) - len(planted)
        print(f"not planted: {harmless} slips listed as harmless, and {waiting} that `make canaries` asks about")
    assert not left, "\n".join(str(planted[bug]) for bug in left)


def test_what_is_called_harmless_can_be_planted():
    bugs = planting.bugs()
    assert [key for key in HARMLESS if not any(matches(key, bug) for bug in bugs)] == []


def test_every_barrier_is_planted():
    """Counted by other means than planting.py finds them."""
    call = re.compile(r"__sync|cp_async_|\b(?:named_barrier|mbarrier|fence)_|arrive_as_warp\((?!uint)|wgmma_[fcw]")
    barriers = 0
    for path in planting.ROOT.joinpath(planting.KERNELS).rglob("*.cuh"):
        if path.name not in planting.NOT_EMULATED:
            code = [line.split("//")[0] for line in path.read_text().splitlines()]
            barriers += sum(len(call.findall(line)) for line in code)
    assert barriers == sum(bug.slip == planting.LEFT_OUT for bug in planting.bugs()) > 0


def test_calls_by_themselves_can_be_left_out():
    code = """{
  __syncwarp();  // why
  if (some) cp_async_16(row[0],
                        column);
  else cp_async_commit();
  cp_async_wait<STAGES - 2>();
  if (!__any_sync(~0u, some)) return;
  int x =
      __shfl_sync(~0u, x, 0);
}"""
    places = [p for p in planting._places("kernel.cuh", code) if p.slips == [planting.LEFT_OUT]]
    assert [code[p.begin : p.end].partition("(")[0] for p in places] == [
        "__syncwarp",
        "cp_async_16",
        "cp_async_commit",
        "cp_async_wait<STAGES - 2>",
    ]


def test_conditions_begin_and_end_where_they_should():
    code = """{
  if (a[0]) return b < c ? d : e;
  const bool f = g < h, i = j == k;
  else return l ? m : n;
}"""
    found = [code[p.begin : p.end] for p in planting._places("kernel.cuh", code) if "true" in p.slips]
    assert found == ["a[0]", "b < c", "g < h", "j == k", "l"]


def test_a_file_belongs_to_the_ops_that_include_it():
    assert planting.ops_of("logits_fwd.cuh") == ["logits"]
    assert planting.ops_of("tile/copy.cuh") == list(planting.OPS)
