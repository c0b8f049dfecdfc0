"""What a call costs the host, beside what it has to compute: microseconds of the process on a layer of four tokens.

On a GPU, a small layer takes less time than it takes Python and PyTorch to ask for it. Times are those that the
processors worked, so that others on the machine do not count.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from .cases import DTYPES, Case
from .peers import Call
from .protocol import BOTH, FORWARD, synchronize

CASE = Case("host", 1, 1, (2, 2), (2, 2), 8)
INFERENCE = "inference"  # the forward under torch.no_grad
CALLS, BATCHES = 200, 15
PASSES: dict[str, Callable[[Call], Any]] = {
    INFERENCE: torch.no_grad()(lambda call: call.forward()),
    FORWARD: lambda call: call.forward(),
    BOTH: lambda call: call.backward_of(call.forward()),
}


def measured(ops: Iterable[ModuleType], device: str, progress: Callable) -> list[dict]:
    rows = []
    with one_thread():
        for op in ops:
            x = op.draw(CASE, DTYPES["bfloat16" if device == "cuda" else "float32"], device)
            op_name = op.__name__.rpartition(".")[2]
            peers = [peer for peer in op.peers_of(CASE, device, compiled=False) if peer.gradients]
            for peer, (name, run) in itertools.product(peers, PASSES.items()):
                call = peer.on(x)
                progress(f"{peer.name}, {name}")
                with peer.around():
                    try:
                        microseconds = cost(lambda run=run, call=call: run(call), device)
                    except RuntimeError:  # this backend does not take so small a layer
                        continue
                rows.append({"op": op_name, "peer": peer.name, "pass": name, "microseconds": microseconds})
    return rows


def cost(run: Callable[[], Any], device: str) -> float:
    """Median of batches of calls."""
    seconds = []
    for _ in range(BATCHES + 1):
        synchronize(device)
        start = time.process_time()
        for _ in range(CALLS):
            run()
        seconds.append(time.process_time() - start)
    return float(f"{1e6 * statistics.median(seconds[1:]) / CALLS:.3g}")


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
