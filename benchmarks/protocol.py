"""How peers are timed: in turns, in one process, medians with quartiles.

    gate       float64 (correctness.py); a peer that is wrong is timed all the same, and printed as wrong
    warm up    every peer once in every pass; its peak memory is read there
    rounds     every peer in every pass, one after the other, as often as the seconds allow

A GPU replays CUDA graphs, timed by events; plain calls, timed by the host with a synchronisation before and after,
show what launches add. What cannot be captured has plain times only. Small problems rotate four sets of inputs, so that
no call finds its own in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from relpos_cuda._race import bytes_of, measure

from . import correctness
from .cases import DTYPES, Case, Inputs
from .floors import work
from .peers import Call, Peer, Refusals

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
PASSES = (FORWARD, BACKWARD, BOTH)
SMALL = 128 << 20  # bytes of all scores
SETS = 4
GRAPH_SAMPLES = 10  # of a visit
Run = Callable[[], tuple[Tensor, ...]]


@dataclasses.dataclass
class Task:
    """A peer in one pass."""

    peer: Peer
    direction: str
    calls: list[Call]  # one for every set of inputs
    peak: float = math.nan  # GiB
    milliseconds: list[float] = dataclasses.field(default_factory=list)  # of plain calls
    replayed: list[float] = dataclasses.field(default_factory=list)
    graphs: list[torch.cuda.CUDAGraph] = dataclasses.field(default_factory=list)
    captured: list[Run] = dataclasses.field(default_factory=list)  # with what a backward reads
    no_graph: str = ""
    first: dict[int, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict)
    deterministic: bool | None = None

    def ready(self, number: int, again: bool = False) -> Run:
        """Does what is not timed, and returns what is."""
        call = self.calls[number % len(self.calls)]
        if self.direction == FORWARD:
            return torch.no_grad()(lambda: (call.forward(),))
        if self.direction == BOTH:
            return lambda: call.backward_of(call.forward())
        out = call.forward()
        return lambda: call.backward_of(out, again)

    def visit(self, number: int, device: str) -> None:
        with self.peer.around():
            run = self.ready(number)
            synchronize(device)
            start = time.perf_counter()
            results = run()
            synchronize(device)
            self.milliseconds.append(1e3 * (time.perf_counter() - start))
        if self.direction != FORWARD:
            self.compare(number % len(self.calls), results)
        if self.graphs:
            self.replayed += [replay_milliseconds(self.graphs[i % len(self.graphs)]) for i in range(GRAPH_SAMPLES)]

    def compare(self, number: int, results: tuple[Tensor, ...]) -> None:
        """Bit by bit with the first run on the same inputs; a gradient that passes through is no result."""
        grad = self.calls[number].grad
        results = tuple(t for t in results if t.data_ptr() != grad.data_ptr())
        if number in self.first:
            same = all(map(torch.equal, results, self.first[number]))
            self.deterministic = same and self.deterministic is not False
        else:
            self.first[number] = results

    def capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            for number in range(len(self.calls)):
                with torch.cuda.stream(stream), self.peer.around():
                    self.ready(number)()
                    run, graph = self.ready(number, again=True), torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=_pool(), stream=stream):
                        run()
                self.graphs.append(graph)
                self.captured.append(run)
        except RuntimeError as error:
            self.graphs, self.captured, self.no_graph = [], [], first_line(error)
        torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _pool() -> Any:
    """One for all: graphs are replayed one at a time."""
    return torch.cuda.graph_pool_handle()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def replay_milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure: rounds until `seconds` are spent on a case, between `least` and `most` of them."""

    seconds: float = 20
    least: int = 3
    most: int = 50
    passes: tuple[str, ...] = PASSES


def bench(
    op: ModuleType, case: Case, dtype: str, device: str, peers: list[Peer], effort: Effort, progress: Callable
) -> tuple[list[dict], Refusals]:
    """Rows of every peer that runs, and why others do not."""
    small = case.groups * case.rows * case.columns * DTYPES[dtype].itemsize <= SMALL
    sets = [op.draw(case, DTYPES[dtype], device, seed) for seed in range(SETS if small else 1)]
    name = op.__name__.rpartition(".")[2]
    found, refused = gate(op, sets[0], peers, progress)
    tasks, dropped = warm_up([p for p in peers if p.name in found], sets, device, effort, progress)
    start, rounds = time.perf_counter(), 0
    while rounds < effort.least or (rounds < effort.most and time.perf_counter() - start < effort.seconds):
        for task in tasks:
            progress(f"{task.peer.name}, {task.direction}, round {rounds + 1}")
            task.visit(rounds, device)
        rounds += 1
    rows = [row_of(name, task, case, dtype, found[task.peer.name]) for task in tasks]
    return rows, refused | dropped


def gate(op: ModuleType, x: Inputs, peers: list[Peer], progress: Callable) -> tuple[dict, Refusals]:
    """Errors of every peer that runs, why the others do not."""
    groups = correctness.groups_to_compare(x)
    progress("float64")
    truth = correctness.exact(op, x, groups)
    found, refused = {}, {}
    for peer in peers:
        progress(f"{peer.name}, against float64")
        try:
            results = correctness.results(peer, x, groups)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            refused[peer.name] = first_line(error)
        else:
            found[peer.name] = correctness.errors(results, truth) if peer.same_work else None
    return found, refused


def warm_up(
    peers: list[Peer], sets: list[Inputs], device: str, effort: Effort, progress: Callable
) -> tuple[list[Task], Refusals]:
    tasks, refused = [], {}
    for peer in peers:
        calls = [peer.on(x) for x in sets]
        for direction in effort.passes if peer.gradients else (FORWARD,):
            task = Task(peer, direction, calls)
            progress(f"{peer.name}, {direction}, warms up")
            try:
                with peer.around():
                    results, _, task.peak = measure(task.ready(0), device)
                if direction != FORWARD:
                    task.compare(0, results)
            except (RuntimeError, NotImplementedError) as error:  # torch.OutOfMemoryError is one
                refused[f"{peer.name}, {direction}"] = first_line(error)
                continue
            if device == "cuda":
                task.capture()
            tasks.append(task)
    return tasks, refused


def row_of(op: str, task: Task, case: Case, dtype: str, errors: correctness.Errors | None) -> dict:
    samples = task.replayed or task.milliseconds
    row = {
        "op": op,
        "case": case.name,
        "dtype": dtype,
        "shape": str(case),
        "pass": task.direction,
        "peer": task.peer.name,
        **spread(samples),
        "samples": len(samples),
        "peak_bytes": bytes_of(task.peak),
        "work": work(op, case, dtype, task.direction),
        "deterministic": task.deterministic,
    }
    if task.replayed:
        row["plain"] = spread(task.milliseconds)
    elif task.no_graph:
        row["no_graph"] = task.no_graph
    if task.peer.note:
        return row | {"note": task.peer.note}
    relevant = errors if task.direction != FORWARD else {"out": errors["out"]}
    return row | {
        "errors": {name: float(f"{error:.2e}") for name, error in relevant.items()},
        "wrong": correctness.is_wrong(relevant, DTYPES[dtype]),
    }


def spread(samples: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    low, median, high = (float(f"{x:.4g}") for x in quartiles)
    return {"milliseconds": median, "quartiles": [low, high]}
