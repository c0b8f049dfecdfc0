"""The benchmark: what it calls right, wrong, refused and out of memory; its file, tables and plots. No times."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import attention, cases, correctness, encoders, floors, lengths, logits, protocol, report, run
from benchmarks.cases import Case, square
from benchmarks.peers import Peer
from relpos_cuda import _env, _race

SMALL = [
    square("square", 2, 2, 6, 16),
    Case("pooled", 1, 3, (8, 6), (4, 3), 8),
    Case("with_cls", 2, 1, (4, 4), (2, 2), 8, prefix=1),
]
OPS = {"attention": attention, "logits": logits}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))


def bench(op: ModuleType, case: Case, peers: list[Peer], dtype: str = "float32") -> tuple[list[dict], dict[str, str]]:
    effort = protocol.Effort(seconds=0, least=5)
    return protocol.bench(op, case, dtype, "cpu", peers, effort, progress=lambda what: None)


@each_op
@pytest.mark.parametrize(
    "case,dtype", [(case, "float32") for case in SMALL] + [(SMALL[0], "bfloat16")], ids=lambda x: getattr(x, "name", x)
)
def test_every_peer_computes_the_same(op: ModuleType, case: Case, dtype: str):
    """Those that torch.compile makes have a test of their own."""
    peers = op.peers_of(case, "cpu", compiled=False)
    rows, refused = bench(op, case, peers, dtype)
    assert refused == {}
    assert {row["peer"] for row in rows} == {p.name for p in peers}
    for row in rows:
        assert row["milliseconds"] > 0 and row["samples"] == 5 and row["op"] == op.__name__.split(".")[1]
        assert row["deterministic"] is (None if row["pass"] == "forward" else True), row
        assert "note" in row or not row["wrong"], row
    trained = {row["peer"] for row in rows if row["pass"] == "backward"}
    assert trained == {p.name for p in peers if p.gradients} >= {op.OURS, "eager" if op is logits else "eager, SAM"}
    ours = next(row for row in rows if (row["peer"], row["pass"]) == (op.OURS, "backward"))
    assert list(ours["errors"]) == ["out", *op.LEAVES]


@pytest.mark.slow
@each_op
def test_compiled_peers_compute_the_same(op: ModuleType):
    case = square("square", 1, 2, 8, 16)
    peers = [p for p in op.peers_of(case, "cpu", compiled=True) if p.name in ("compiled", "flex")]
    assert len(peers) == (2 if op is attention else 1)
    rows, refused = bench(op, case, peers)
    assert refused == {} and not any(row["wrong"] for row in rows)


@each_op
@pytest.mark.parametrize("gradient", [False, True])
def test_a_peer_that_is_wrong_is_called_so(op: ModuleType, gradient: bool):
    """In its result, or in one gradient only."""

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x.detach() + 1.1 * (x - x.detach()) if gradient else 1.01 * x

    right = op.peers_of(SMALL[0], "cpu", compiled=False)[0]

    def on(x: cases.Inputs):
        call = right.on(x)
        return type(call)(lambda: wrong(call.forward()), call.leaves, call.grad)

    rows, _ = bench(op, SMALL[0], [Peer("wrong", on, right.gradients)])
    assert [row["wrong"] for row in rows] == [not gradient, True, True]
    assert max(rows[-1]["errors"].values()) == pytest.approx(0.1 if gradient else 0.01, rel=0.1)


def test_not_a_number_is_wrong():
    assert correctness.is_wrong({"out": float("nan")}, torch.float32)
    assert correctness.is_wrong({"out": 0.0, "q": float("inf")}, torch.float32)
    assert not correctness.is_wrong({"out": 1e-6}, torch.float32)


def test_gradients_of_few_groups_are_those_of_all():
    """The float64 side sees two of four groups; the others have no gradient."""
    x = attention.draw(SMALL[0], torch.float64, "cpu")
    groups = [0, 3]
    truth = correctness.exact(attention, x, groups)
    of_all = correctness.exact(attention, correctness.of_groups_only(x, groups), [0, 1, 2, 3])
    for name, t in truth.items():
        torch.testing.assert_close(of_all[name] if name.startswith("rel_pos") else of_all[name][groups], t)
    assert correctness.groups_to_compare(x) == [0, 1, 2, 3]
    large = attention.draw(square("large", 1, 7, 80, 2), torch.float32, "cpu")
    assert correctness.groups_to_compare(large) == [0, 6]


def test_a_peer_that_cannot_run_is_refused_with_its_reason():
    def cannot(x: cases.Inputs) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand a stack trace")

    def no_backward(x: cases.Inputs) -> torch.Tensor:
        return attention.ours(x).detach()

    peers = [attention.peer("cannot", cannot), attention.peer("no backward", no_backward)]
    rows, refused = bench(attention, SMALL[0], peers)
    assert rows == [] and refused["cannot"] == "no kernel for this" and "grad" in refused["no backward"]


def test_results_that_vary_are_told():
    call = attention.peers_of(SMALL[0], "cpu", False)[0].on(attention.draw(SMALL[0], torch.float32, "cpu"))
    task = protocol.Task(Peer("a peer", lambda x: call, ("q",)), protocol.BOTH, [call])
    for value, deterministic in ((1.0, None), (1.0, True), (1.5, False), (1.0, False)):
        task.compare(0, (torch.tensor([value]), call.grad))
        assert task.deterministic is deterministic


@pytest.mark.parametrize("op", ["attention", "logits"])
def test_floors(op: str):
    case = Case("a case", 2, 3, (4, 5), (2, 3), 8, prefix=1)
    q, k, scores, factors = 6 * 21 * 8, 6 * 7 * 8, 6 * 21 * 7, 2 * 6 * 21 * 5 * 8
    forward, backward, both = (floors.work(op, case, "bfloat16", p) for p in protocol.PASSES)
    if op == "attention":
        assert forward == {"flops": 2 * 2 * scores * 8 + factors, "bytes": 2 * (2 * q + 2 * k)}
        assert backward == {"flops": 5 * 2 * scores * 8 + 3 * factors, "bytes": 2 * (4 * q + 4 * k)}
    else:
        assert forward == {"flops": factors, "bytes": 2 * (2 * scores + q)}
        assert backward == {"flops": 2 * factors, "bytes": 2 * (scores + 2 * q)}
    assert both == {key: forward[key] + backward[key] for key in forward}
    assert floors.floor_milliseconds(flops=10**9, bytes=10**6, gflops=100, gbytes=10) == 10
    assert floors.floor_milliseconds(flops=10**6, bytes=10**9, gflops=100, gbytes=10) == 100


# ---- lengths


@pytest.mark.slow
def test_what_does_not_fit_is_out_of_memory(monkeypatch: pytest.MonkeyPatch):
    """48 x 48 eager takes a GiB, ours nothing of the kind; each in a process of its own."""
    monkeypatch.setattr(lengths, "PEERS", {"cpu": ("ours", "eager, SAM")})
    said: list[str] = []
    rows = lengths.measured("cpu", "float32", 0.5, 1e9, (4, 48), said.append)
    assert len(said) == len(rows) == 2 * 2 * 2
    outcome = {(row["peer"], row["pass"]): row.get("outcome") for row in rows if row["side"] == 48}
    assert outcome["eager, SAM", "forward"] == outcome["eager, SAM", "forward + backward"] == "out of memory"
    assert outcome["ours", "forward"] is outcome["ours", "forward + backward"] is None


def test_what_would_take_too_long_is_not_run():
    rows = list(lengths.rows_of("ours", "cpu", "float32", 1e3, 1e-6, [2, 4, 8]))
    assert [(row["side"], "outcome" in row) for row in rows] == [(n, n > 2) for n in (2, 2, 4, 4, 8, 8)]
    assert re.fullmatch(r"not run: about \d+ s", rows[-1]["outcome"])


# ---- encoders


@pytest.mark.parametrize("quick", [True, False])
def test_encoders(quick: bool, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    from test_demo import small_encoder

    monkeypatch.setattr(encoders.demo, "_empty_model", small_encoder)
    rows = encoders.measured("cpu", ["float32"], quick, progress=lambda what: None)
    sides = (256, 256) if quick else (1024, 512)
    assert [(row["model"], row["pass"], row["variant"]) for row in rows] == [
        (f"SAM ViT-B, {side} pixels", name, variant)
        for side, name in zip(sides, encoders.PASSES, strict=True)
        for variant in (encoders.STOCK, encoders.SDPA, encoders.OURS)
    ]
    assert all(row["milliseconds"] > 0 and row["error"] < 1e-5 for row in rows)
    assert "SAM ViT-B, 256 pixels, inference" in report.text_of({"encoders": rows}, {"rates": [None]}) or not quick


def test_an_encoder_of_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(*shape: object) -> None:
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(encoders, "MODELS", {"SAM ViT-B": missing})
    rows = encoders.measured("cpu", ["float32"], True, progress=lambda what: None)
    assert [row["variant"] for row in rows] == ["No module named 'torchvision'"] * 2
    assert "No module named" in report.text_of({"encoders": rows}, {"rates": [None]})


@pytest.mark.slow
def test_the_vitdet_of_the_benchmark():
    pytest.importorskip("transformers")
    variants, pixels = encoders.vitdet(64, "cpu", torch.float32)
    for run_pass in encoders.PASSES.values():
        stock, ours = (step() for step in encoders.steps_of(variants, run_pass, pixels).values())
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4)


# ---- the command


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CASES", {case.name: case for case in SMALL})
    monkeypatch.setattr(run, "QUICK", ("square", "with_cls"))
    monkeypatch.setattr(lengths, "SIDES", (4, 8))
    monkeypatch.setattr(run.machine, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(run.machine, "PRODUCT", {"cpu": 64})


@pytest.mark.usefixtures("small_cases")
def test_one_command_gives_tables_file_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert run.main(["--quick", "--parts", "ops", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed, file = capsys.readouterr().out, tmp_path / "bench.json"
    result = json.loads(file.read_text())
    assert {(row["op"], row["case"]) for row in result["rows"]} == {
        (op, case) for op in OPS for case in ("square", "with_cls")
    }
    assert len(result["rates"]) == 2 and result["about"]["versions"]["torch"] == torch.__version__
    assert "before: memory" in printed and "after: memory" in printed and "attention, square: 4 x 6x6, D 16" in printed
    for row in result["rows"]:
        assert re.search(rf"{re.escape(row['pass'])} +{re.escape(row['peer'])} +{row['milliseconds']:.4g} ", printed), (
            row
        )
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "peers.svg", "roofline.svg"}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.svg")}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert all(digest.encode() in content for content in before.values())
    assert run.main(["--plot", str(file), "--out", str(tmp_path)]) == 0
    assert all(path.read_bytes() == content for path, content in before.items()), "the same file, the same plots"


@pytest.mark.usefixtures("small_cases")
def test_the_command_fails_if_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(attention, "ours", lambda x: 1.01 * attention.eager_sam(x))
    arguments = ["--quick", "--parts", "ops", "--ops", "attention", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    assert re.search(r"ours .* WRONG", capsys.readouterr().out)


def test_the_command_fails_if_ours_does_not_run(small_cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(x):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "ours", refuses)
    arguments = ["--quick", "--parts", "ops", "--ops", "attention", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(arguments) == 1


def test_kernels_of_every_architecture_take_turns(small_cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(attention, "ours", lambda x: (asked.append(_env.WGMMA()), attention.eager_sam(x))[1])
    arguments = ["--quick", "--parts", "ops", "--ops", "attention", "--mma-sync", "--device", "cpu"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0 and _env.WGMMA() == "auto"
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["peer"] for row in rows if "ours" in row["peer"]][:4] == ["ours"] * 2 + ["ours, mma.sync"] * 2
    assert asked.count("auto") == asked.count("0") > 0


def test_memory_that_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_race, "_resident", lambda row, forget_peak=False: math.nan)
    rows = list(lengths.rows_of("ours", "cpu", "float32", 12, 10, [4, 8]))
    assert [(row["side"], row["peak_bytes"]) for row in rows] == [(4, None), (4, None), (8, None), (8, None)]
    rows = [row | {"peer": "ours", "dtype": "float32"} for row in rows]
    assert "? MiB" in report.text_of({"lengths": rows}, {"rates": [None]})
    x = torch.zeros(1)
    steps = dict.fromkeys((encoders.STOCK, encoders.OURS), lambda: x)
    assert [row["peak_bytes"] for row in encoders.rows_of(steps, "cpu", 1)] == [None, None]


LENGTHS = [
    {"peer": "ours", "dtype": "float32", "pass": p, "side": n, "milliseconds": n**4 / 1e3, "peak_bytes": n * n * 1024}
    for p in ("forward", "forward + backward")
    for n in (14, 64, 128)
] + [
    {"peer": "eager, SAM", "dtype": "float32", "pass": p, "side": 14, "milliseconds": 80.0, "peak_bytes": 2**30}
    for p in ("forward", "forward + backward")
]
LENGTHS += [row | {"side": 64, "outcome": "out of memory"} for row in LENGTHS if row["peer"] != "ours"]


def test_lengths_are_shown(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    table = report.text_of({"lengths": LENGTHS}, {"rates": [None]}).splitlines()
    assert table[0] == "a layer against its length, forward, float32"
    assert table[3].split() == ["64", "x", "64", "16777", "ms,", "4", "MiB", "out", "of", "memory"]
    about = {"device": "a machine", "versions": {"torch": "2"}, "date": "today"}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"about": about, "rows": [], "lengths": LENGTHS}))
    assert [path.name for path in plots.draw(file, tmp_path)] == ["time.svg", "memory.svg"]
    assert "out of memory at 64" in (tmp_path / "memory.svg").read_text()
