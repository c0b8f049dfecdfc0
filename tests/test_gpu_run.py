"""benchmarks/gpu_run.sh and its probe, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_probe, probe_formulas
from relpos_cuda import _libraries, _toolchain
from simt import cases_sm90, toolchain

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"
STEPS = ["info", "build", "probe", "wgmma", "bench", "profile", "tests", "sanitize"]
NO_GPU = "#!/bin/sh\necho No devices were found\nexit 6\n"
ONE_GPU = """#!/bin/sh
case "$*" in *name,driver_version*) echo "NVIDIA Pretend 9000 (rev. 2), 999.01" ;; *) echo "pretend smi" ;; esac
"""

needs_emulator = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))
each_probe = pytest.mark.parametrize("name", probe_formulas.PROBES)

# ---- the script


def script(*arguments: str, smi: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """From another folder, with an nvidia-smi of our own."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text(smi)
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in ("OUT", "BUDGET", "COMMIT")}
    variables = {"PATH": path, "PYTHON": sys.executable, "OUT": str(folder / "out"), **variables}
    return subprocess.run(
        [str(SCRIPT), *arguments], cwd=folder, env={**kept, **variables}, capture_output=True, text=True
    )


def test_syntax():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_without_a_gpu_one_line_and_nothing_else(tmp_path: Path):
    done = script(smi=NO_GPU, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no NVIDIA GPU: nvidia-smi is missing or shows none; nothing was run\n"
    assert not (tmp_path / "out").exists()


def test_steps_are_listed_and_explained(tmp_path: Path):
    done = script("--list", smi=NO_GPU, folder=tmp_path)
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == STEPS
    done = script("--help", smi=NO_GPU, folder=tmp_path)
    assert done.returncode == 0 and re.findall(r"^    (\w+)  ", done.stdout, re.M) == STEPS


def test_an_unknown_step_is_refused_before_anything_runs(tmp_path: Path):
    done = script("info", "fly", smi=ONE_GPU, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"no step is called 'fly'; there are: {' '.join(STEPS)}\n"
    assert not (tmp_path / "out").exists()


def test_tests_left_out_exist():
    names = re.search(r'^CPU_TESTS="([^"]*)"', SCRIPT.read_text(), re.M)[1].split()
    assert [n for n in names if not (ROOT / "tests" / f"test_{n}.py").is_file()] == []


def test_a_failing_step_stops_nothing_and_is_in_the_summary(tmp_path: Path):
    broken = tmp_path / "tools" / "compute-sanitizer"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho broken on purpose\nexit 9\n")
    broken.chmod(0o755)
    archive = tmp_path / "all.tar.gz"
    done = script("sanitize", "info", smi=ONE_GPU, folder=tmp_path, COMMIT="abc1234", ARCHIVE=str(archive))
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    about = {key: summary[key] for key in ("commit", "device", "driver", "torch")}
    assert about == {
        "commit": "abc1234",
        "device": "NVIDIA Pretend 9000 (rev. 2)",
        "driver": "999.01",
        "torch": torch.__version__,
    }
    assert [(row["step"], row["exit"]) for row in summary["steps"]] == [("sanitize", 9), ("info", 0)]
    log = (out / "log.txt").read_text()
    assert "pretend smi" in log and "plan of the logits kernels" in log and log.count("broken on purpose") == 4
    assert log.strip() in done.stdout, "shown as it happens"
    files = {"log.txt", "summary.json", "clocks.csv"}
    assert {f.name for f in out.iterdir()} == files
    with tarfile.open(archive) as packed:
        assert {Path(name).name for name in packed.getnames() if name != "."} == files
        assert json.load(packed.extractfile("./summary.json")) == summary


def test_a_spent_budget_is_said_and_earlier_rows_stay(tmp_path: Path):
    for budget, steps in (("100", ["info"]), ("0", ["probe", "bench"])):
        done = script(*steps, smi=ONE_GPU, folder=tmp_path, COMMIT="abc1234", BUDGET=budget)
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert [(row["step"], row["exit"], row["timed_out"]) for row in rows] == [
        ("info", 0, False),
        ("probe", 124, True),
        ("bench", 124, True),
    ]
    assert done.returncode == 1 and done.stdout.count("not run: BUDGET is spent") == 2


def test_only_tests_of_the_gpu_are_collected(tmp_path: Path):
    done = script("tests", smi=ONE_GPU, folder=tmp_path, TEST_ARGS="--collect-only -qq")
    assert done.returncode == 0, done.stdout
    found = re.findall(r"^(tests/.*?\.py)::", done.stdout, re.M)
    names = re.search(r'^CPU_TESTS="([^"]*)"', SCRIPT.read_text(), re.M)[1].split()
    assert not set(found) & {f"tests/test_{name}.py" for name in [*names, "attention_sm90"]}
    assert {"tests/test_attention.py", "tests/test_logits.py", "tests/test_fallback.py"} <= set(found)
    assert not [file for file in found if "integrations" in file]
    assert len(found) < 900


POISONED = """
import importlib.util
import torch

spec = importlib.util.spec_from_file_location("theirs", {conftest!r})
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
pytest_runtest_logfinish = theirs.pytest_runtest_logfinish
broken = []

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), synchronize
"""


def test_an_error_that_cuda_does_not_recover_from_ends_one_test_only(tmp_path: Path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(POISONED.format(conftest=str(ROOT / "tests" / "conftest.py")))
    (tmp_path / "test_poisoned.py").write_text(
        "import conftest, pytest\n@pytest.mark.parametrize('i', range(12))\ndef test(i):\n"
        "    assert not conftest.broken\n    if i == 3:\n        conftest.broken.append(i)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)]
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert re.search("1 failed, 1[12] passed", done.stdout), done.stdout
    assert "crashed while running" in done.stdout


# ---- the probe


def test_every_function_of_ptx_has_a_probe():
    text = (ROOT / "csrc" / "cuda" / "tile" / "ptx.cuh").read_text()
    no_probes = {"pin", "afresh", "prefetch_l2"}  # a part of wgmma_wait; no instruction; nothing to compare
    functions = set(re.findall(r"__forceinline__ \w+ (\w+)(?:<\w+>)?\(", text)) - no_probes
    kernels = [gpu_probe.HERE / "probe.cu", toolchain.HERE / "selftest_sm90.cuh"]
    called = set(re.findall(r"relpos::(\w+)(?:<[^;]*?>)?\(", "".join(k.read_text() for k in kernels)))
    assert functions == called & functions, f"no probe calls {functions - called}"
    assert {name.split()[0] for name in probe_formulas.PROBES} <= functions
    specialised = set(re.findall(r"mma_m16n8k16<(\w+)>", text))
    assert len(specialised) == sum(name.startswith("mma_m16n8k16") for name in probe_formulas.PROBES)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> gpu_probe.Probe:
    library = tmp_path_factory.mktemp("probe") / "emulated.so"
    flags = ["-O1", *_libraries.STABLE_ABI, "-isystem", str(_toolchain.torch().include), *_libraries.torch_inputs()]
    sources = (gpu_probe.HERE / "probe.cu", toolchain.HERE / "selftest_sm90.cpp")
    toolchain.compile_library(sources, library, extra=flags)
    return gpu_probe.load(library)


@needs_emulator
@each_probe
def test_the_emulator_computes_the_formula(emulated: gpu_probe.Probe, name: str):
    assert gpu_probe.wrong_words(emulated, name) == 0


@needs_emulator
@pytest.mark.parametrize("dtype", probe_formulas.HALVES)
def test_mma_is_an_integer_product(emulated: gpu_probe.Probe, dtype: str):
    name = f"mma_m16n8k16 {dtype}"
    a, b, d = probe_formulas.operands(name, torch.Generator().manual_seed(1))
    words = emulated(name, probe_formulas.words_of(name, (a, b, d))).view(torch.float32)
    want = [[d[i, j].item() + sum(int(a[i, k]) * int(b[k, j]) for k in range(16)) for j in range(8)] for i in range(16)]
    got = [[words[i % 8 * 4 + j // 2, i // 8 * 2 + j % 2].item() for j in range(8)] for i in range(16)]
    assert got == want


def test_a_wrong_bit_is_counted():
    def off_by_one_bit(name: str, words: torch.Tensor) -> torch.Tensor:
        return words ^ (torch.arange(32)[:, None] == 5).int()

    assert gpu_probe.wrong_words(off_by_one_bit, "load_stream", draws=3) == 3 * 4


def test_of_exp2_alone_the_last_bits_are_free():
    def off_by(bits: int, name: str) -> int:
        def probe(name: str, words: torch.Tensor) -> torch.Tensor:
            return probe_formulas.formula(name, (words,)) ^ bits

        return gpu_probe.wrong_words(probe, name, draws=1)

    assert off_by(1, "exp2_approx") < 8 < 24 < off_by(16, "exp2_approx")  # not free: zero, infinity
    assert off_by(1, "ldmatrix_x4") > 24


@pytest.mark.parametrize(
    "processes,right,says",
    [
        ([["", "", ""]], True, "0 of 3 cases are wrong, 0 not asked"),
        ([["", "1 wrong", ""]], False, "two: 1 wrong"),
        ([["", "CUDA error: all is lost"], [""]], False, "1 of 3 cases are wrong, 0 not asked"),
        ([[], ["", ""]], False, "one: no answer"),
        ([["CUDA error"], ["CUDA error"]], False, "2 of 2 cases are wrong, 1 not asked"),
        ([[f"this GPU has {gpu_probe.NO_SM90}"]], True, "skipped"),
    ],
)
def test_hopper_cases_are_counted_over_many_processes(processes, right, says, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cases_sm90, "every_case", lambda: dict.fromkeys(["one", "two", "three"]))
    monkeypatch.setattr(gpu_probe, "MOST_PROCESSES", len(processes))
    answers = iter(processes)
    assert gpu_probe.hopper_is_right(lambda first: (asked.append(first), next(answers))[1]) == right
    assert says in capsys.readouterr().out
    assert asked == sorted(set(asked)), "no case twice"


def test_a_hopper_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_probe, "PATIENCE", 1)
    code = "import time; print('one', flush=True); time.sleep(0.5); print('two', flush=True); time.sleep(60)"
    start = time.monotonic()
    assert list(gpu_probe.lines_of([sys.executable, "-c", code])) == ["one", "two"]
    assert time.monotonic() - start < 30


def test_products_are_asked_before_what_no_kernel_does():
    names = list(cases_sm90.every_case())
    first = {part: min(i for i, name in enumerate(names) if part in name) for part in ("rs ", "inside", "outside")}
    assert first["rs "] < first["inside"] < first["outside"]
    assert not any("outside" in name for name in names[: first["outside"]])


def test_a_hopper_process_ends_with_the_context(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    one, two = torch.ones(2), torch.tensor([1.0, 2.0])
    cases = [(None, one), (None, two), ("broken\nhere", one), ("CUDA error: illegal", one), (None, one)]
    every = {str(i): lambda test, case=case: cases_sm90.Answer(*case, one) for i, case in enumerate(cases)}
    monkeypatch.setattr(cases_sm90, "every_case", lambda: every)
    monkeypatch.setattr(gpu_probe, "Selftest", lambda library: None)
    assert gpu_probe.answer_hopper(Path("none"), 1) == 1
    assert capsys.readouterr().out.splitlines() == ["1 wrong", "broken here", "CUDA error: illegal"]
    assert gpu_probe.answer_hopper(Path("none"), 4) == 0


# ---- sanitize, profile


@pytest.mark.parametrize("arguments", [[], ["fly"], ["hopper", "a file"], ["layers"], ["table"], ["probe", "more"]])
def test_what_the_probe_does_not_do(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["gpu_probe", *arguments])
    assert gpu_probe.main() == 2


def test_sanitized_problems_exist():
    assert {p.name for p in gpu_probe.TINY} >= set(gpu_probe.SANITIZED)


def test_the_csv_of_ncu_becomes_a_table():
    csv = (
        '==PROF== Connected\n"ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","","us","register/thread"\n"0","logits_fwd_kernel","(64, 1, 1)","12.5","80"\n'
    )
    assert gpu_probe.table_of(csv).splitlines() == [
        "id  time  registers        grid        kernel",
        "    us    register/thread",
        "0   12.5  80               (64, 1, 1)  logits_fwd_kernel",
    ]
    assert gpu_probe.table_of("==ERROR== no permission\n") == "no kernel was profiled"
