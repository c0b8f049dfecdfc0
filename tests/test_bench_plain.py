"""The benchmark beside CUDA graphs: like is compared with like, and what a call costs the host."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import attention, documents, host, logits, report, run
from relpos_cuda import _env


def row(peer: str, milliseconds: float, plain: float | None = None) -> dict:
    measured = {"milliseconds": milliseconds} | ({"plain": {"milliseconds": plain}} if plain else {})
    return {"op": "attention", "shape": "a layer", "dtype": "bfloat16", "peer": peer, **measured}


@pytest.mark.parametrize(
    ("other", "multiple"),
    [
        (row("captured", 3.0, 8.0), 3.0),  # graph against graph
        (row("not captured", 8.0), 2.0),  # plain calls against plain calls
    ],
    ids=lambda value: value["peer"] if isinstance(value, dict) else "",
)
def test_plain_calls_are_compared_with_plain_calls(other: dict, multiple: float):
    ours = row("ours", 1.0, 4.0)
    assert report.times_ours(other, ours) == multiple
    assert report.times_ours(ours, other) == 1 / multiple
    assert report.times_ours(report.plain(other), report.plain(ours)) == 2.0


def test_the_fastest_of_a_kind_is_the_fastest_beside_ours():
    """A graph of 3 ms beside ours of 1 ms is slower than plain calls of 8 ms beside ours of 4 ms."""
    rows = [
        peer | {"pass": direction}
        for direction in documents.PASSES
        for peer in (row("ours", 1.0, 4.0), row("eager, SAM", 3.0, 9.0), row("eager, HF", 8.0))
    ]
    result = {"about": {"device": "a GPU"}, "rows": rows}
    _, line = documents.summary(result)
    assert line == ("a GPU", "a layer, bfloat16", *("1.000 ms", "", "2.0 x", "") * 2)
    _, forward, _ = documents.plain_calls(result)
    assert forward == ("a layer", "bfloat16", "forward", "4.000 ms", "2.2 x", "2.0 x")


def test_what_a_call_costs_the_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "CALLS", 2)
    said: list[str] = []
    rows = host.measured([attention, logits], "cpu", said.append)
    assert len(said) == len(rows) and all(row["microseconds"] > 0 for row in rows)
    for op in (attention, logits):
        peers = {p.name for p in op.peers_of(host.CASE, "cpu", compiled=False) if p.gradients}
        found = {(row["peer"], row["pass"]) for row in rows if row["op"] == op.__name__.rpartition(".")[2]}
        assert found == {(name, direction) for name in peers for direction in host.PASSES}
    lines = report.text_of({"host": rows}, {"rates": [None]}).splitlines()
    assert lines[0] == "attention, microseconds of the host per call"
    assert lines[1].split() == ["peer", "inference", "forward", "forward", "+", "backward"]
    heading, *others = documents.host({"host": rows})
    assert heading == ("op", "peer", "inference", "forward", "forward + backward")
    assert [line[:2] for line in others][0] == ("attention", "ours")
    assert "host" in run.PART


def test_a_peer_that_raises_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    for name, before in (("wgmma unset", None), ("wgmma set", "1")):
        if before is None:
            monkeypatch.delenv(_env.WGMMA.name, raising=False)
        else:
            monkeypatch.setenv(_env.WGMMA.name, before)
        threads = torch.get_num_threads()
        with pytest.raises(RuntimeError, match=name), attention.without_wgmma(), host.one_thread():
            assert _env.WGMMA() == "0" and torch.get_num_threads() == 1
            raise RuntimeError(name)
        assert os.environ.get(_env.WGMMA.name) == before and torch.get_num_threads() == threads


def test_a_backend_that_does_not_take_the_layer_is_left_out():
    def refuses(x):
        raise RuntimeError("no kernel for four tokens")

    class Op:
        __name__ = "benchmarks.attention"
        draw = staticmethod(attention.draw)

        @staticmethod
        def peers_of(*_, compiled):
            return [attention.peer("refuses", refuses)]

    assert host.measured([Op()], "cpu", lambda what: None) == []
