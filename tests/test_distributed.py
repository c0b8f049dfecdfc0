"""Two processes compute what one does: DistributedDataParallel, FSDP2, DTensors sharded over batch and heads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import relpos_cuda

PROCESSES = 2
BATCH, HEADS, GRID, D = 2, 4, (3, 4), 8
Gradients = dict[str, Tensor]


def layer() -> relpos_cuda.RelPosAttention:
    torch.manual_seed(0)
    module = relpos_cuda.RelPosAttention(HEADS * D, HEADS, GRID)
    nn.init.normal_(module.rel_pos_h), nn.init.normal_(module.rel_pos_w)
    return module


def images() -> Tensor:
    return torch.randn(BATCH, *GRID, HEADS * D, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor) -> Gradients:
    module(x).square().mean().backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return {name.replace("module.", ""): whole(p.grad) for name, p in module.named_parameters()}


# ---- what every process does; each returns what must be equal, and what it must be equal to


def ddp(rank: int) -> tuple[Gradients, Gradients]:
    module = nn.parallel.DistributedDataParallel(layer())
    return gradients(module, images()[rank : rank + 1]), gradients(layer(), images())


def fsdp2(rank: int) -> tuple[Gradients, Gradients]:
    from torch.distributed.fsdp import fully_shard

    module = fully_shard(layer())
    return gradients(module, images()[rank : rank + 1]), gradients(layer(), images())


def operands(op: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    tokens = GRID[0] * GRID[1]
    shapes = {name: (BATCH, HEADS, tokens, D) for name in ("q", "k", "v")}
    if op == "logits":
        shapes = {"attn": (BATCH, HEADS, tokens, tokens), "q": shapes["q"]}
    shapes |= {"rel_pos_h": (2 * GRID[0] - 1, D), "rel_pos_w": (2 * GRID[1] - 1, D)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def dtensors(op: str, axis: int) -> tuple[Gradients, Gradients]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    function = {"logits": relpos_cuda.add_decomposed_rel_pos, "attention": relpos_cuda.rel_pos_attention}[op]

    def run(place: Callable[[str, Tensor], Tensor]) -> Gradients:
        leaves = {name: place(name, t).detach().requires_grad_() for name, t in operands(op).items()}
        out = function(**leaves, q_size=GRID, k_size=GRID)
        out.square().sum().backward()
        found = {"out": out.detach(), **{name: t.grad for name, t in leaves.items()}}
        return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}

    def sharded(name: str, t: Tensor) -> Tensor:
        return distribute_tensor(t, mesh, [Replicate() if name.startswith("rel_pos") else Shard(axis)])

    return run(sharded), run(lambda name, t: t)


def refusals(rank: int) -> tuple[Gradients, Gradients]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    plain = operands("attention")
    whole = {name: distribute_tensor(t, mesh, [Replicate()]) for name, t in plain.items()}
    for wrong, message in (
        ({"rel_pos_h": plain["rel_pos_h"]}, "rel_pos_h must be a DTensor, as others are, got Tensor"),
        ({"q": plain["q"]}, "q must be a DTensor, as others are, got Tensor"),
        ({name: plain[name] for name in "qkv"}, "q must be a DTensor, as others are, got Tensor"),
        ({"q": distribute_tensor(plain["q"], mesh, [Shard(2)])}, "q must be sharded along batch or heads"),
    ):
        with pytest.raises(ValueError, match=message):
            relpos_cuda.rel_pos_attention(**whole | wrong, q_size=GRID, k_size=GRID)
    logits = {name: distribute_tensor(t, mesh, [Replicate()]) for name, t in operands("logits").items()}
    for attn, q in (((4, 2), (2, 4)), ((2, 2, 2), (2, 4)), ((8,), (2, 4)), ((2, 4), (8,))):
        tokens = GRID[0] * GRID[1]
        shapes = {"attn": (*attn, tokens, tokens), "q": (*q, tokens, D)}
        named = {name: distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]) for name, shape in shapes.items()}
        with pytest.raises(ValueError, match=r"q must have the leading axes of attn, \[.*which is sharded"):
            relpos_cuda.add_decomposed_rel_pos(**logits | named, q_size=GRID, k_size=GRID)
    for call in (
        lambda: relpos_cuda.get_rel_pos(3, 3, logits["rel_pos_h"]),
        lambda: relpos_cuda.decomposed_rel_pos(plain["q"], plain["rel_pos_h"], logits["rel_pos_w"], GRID, GRID),
    ):
        with pytest.raises(TypeError, match="rel_pos.* must be a local tensor, got a DTensor"):
            call()
    return {}, {}


CHECKS: dict[str, Callable[[int], tuple[Gradients, Gradients]]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "logits over batch": lambda rank: dtensors("logits", 0),
    "logits over heads": lambda rank: dtensors("logits", 1),
    "attention over batch": lambda rank: dtensors("attention", 0),
    "attention over heads": lambda rank: dtensors("attention", 1),
    "refusals": refusals,
}


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    for name, check in CHECKS.items():
        got, expected = check(rank)
        assert got.keys() == expected.keys()
        for key, value in got.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        if rank == 0:
            print("right:", name, flush=True)
    dist.barrier()  # nobody leaves while another still waits for an answer
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_two_processes(tmp_path: Path):
    path = os.pathsep.join((str(Path(relpos_cuda.__file__).parent.parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    commands = ([sys.executable, __file__, str(rank), str(tmp_path / "store")] for rank in range(PROCESSES))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, cwd=Path(__file__).parent, **pipes) for command in commands]
    printed = [process.communicate(timeout=240) for process in processes]
    ends = "\n".join(f"{p.returncode}: {err[-1000:]}" for p, (_, err) in zip(processes, printed, strict=True))
    assert [process.returncode for process in processes] == [0] * PROCESSES, ends
    assert printed[0][0].splitlines() == [f"right: {name}" for name in CHECKS]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
