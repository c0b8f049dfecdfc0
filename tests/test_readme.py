"""The README says what is: its example runs, its list of variables is the one in the code."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import relpos_cuda
from relpos_cuda import _env

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs():
    on_logits, whole, model = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(on_logits, names)
    expected = names["out"]
    exec(whole, names)
    assert names["out"].shape == (1, 12, 64 * 64, 64)
    torch.testing.assert_close(names["out"], expected)
    with torch.device("meta"):  # as large as real ones
        exec(model, names)
    assert not any("forward" in vars(m) for m in names["model"].modules())


def test_environment_table():
    assert _env.markdown_table() in README


def test_measured_rows_are_those_of_committed_results(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import documents

    shown = []
    for document in documents.DOCUMENTS:
        text = document.read_text()
        assert documents.written(text) == text, "python -m benchmarks.documents"
        shown += [(what, file) for _, what, files, _ in documents.TABLE.findall(text) for file in files.split()]
    assert {what for what, _ in shown} == set(documents.TABLES)
    assert {documents.RESULTS / file for _, file in shown} == set(documents.RESULTS.glob("*/*.json"))


def test_wrong_peers_are_no_rivals(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import documents

    rows = [
        {"op": "attention", "shape": "a layer", "dtype": "float32", "pass": direction, "peer": peer, **measured}
        for direction in documents.PASSES
        for peer, measured in {
            "ours": {"milliseconds": 8.0},
            "eager, SAM": {"milliseconds": 2.0, "wrong": True},
            "eager, HF": {"milliseconds": 20.0, "wrong": False},
        }.items()
    ]
    result = {"about": {"device": "a machine"}, "rows": rows}
    _, forward, both = documents.op_table("attention", result)
    assert forward[3:] == both[3:] == ("8.0 ms", "wrong", "2.5 x")
    _, line = documents.summary(result)
    assert line == ("a machine", "a layer, float32", *("8.0 ms", "", "2.5 x", "") * 2)


def test_plots_are_those_of_committed_results():
    plots = re.findall(r"!\[[^]]+\]\((docs/plots/\w+\.svg)\)", README)
    assert {Path(plot).stem for plot in plots} == {path.stem for path in ROOT.glob("docs/plots/*.svg")} != set()
    committed = {hashlib.sha256(file.read_bytes()).hexdigest() for file in ROOT.glob("benchmarks/results/*/*.json")}
    for plot in plots:
        assert re.search(r"drawn from \S+, sha256 (\w+)", (ROOT / plot).read_text())[1] in committed


@pytest.mark.parametrize("name", relpos_cuda.__all__)
def test_public_functions_are_documented(name: str):
    function = getattr(relpos_cuda, name)
    assert name in README or inspect.ismodule(function) or name in ("get_rel_pos", "decomposed_rel_pos")
    if inspect.isfunction(function):
        assert all(section in function.__doc__ for section in ("Args:", "Returns:", "Raises:", "Source:"))
