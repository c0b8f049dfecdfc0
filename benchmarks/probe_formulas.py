"""What the functions of csrc/cuda/tile/ptx.cuh must give, by the PTX manual: benchmarks/gpu_probe.py asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PROBES = {  # words per lane: in, out
    "ldmatrix_x4": (4, 4),
    "ldmatrix_x4_trans": (4, 4),
    "ldmatrix_x2": (4, 2),
    "ldmatrix_x2_trans": (4, 2),
    "mma_m16n8k16 float16": (10, 4),
    "mma_m16n8k16 bfloat16": (10, 4),
    "exp2_approx": (1, 1),
    "load_stream": (4, 4),
    "cp_async_16": (8, 4),
}


def operands(name: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Any bits; for mma a [16, 16], b [16, 8] and d [16, 8], integers so small that all sums are exact."""
    if name == "exp2_approx":
        x = torch.empty(32, 1).uniform_(-160, 140, generator=generator)
        x[:8] = torch.tensor([[0, -0.0, 1, -3, 1e-40, torch.inf, -torch.inf, torch.nan]]).T
        return (x.view(torch.int32),)
    if not name.startswith("mma"):
        return (torch.randint(-(2**31), 2**31, (32, PROBES[name][0]), generator=generator).int(),)
    shapes = ((16, 16), (16, 8), (16, 8))
    return tuple(torch.randint(-9, 10, shape, generator=generator) for shape in shapes)


def words_of(name: str, given: tuple[Tensor, ...]) -> Tensor:
    """[32, in]: what each lane gets."""
    if len(given) == 1:
        return given[0]
    a, b, d = given
    quarters = [a[i : i + 8, k : k + 8] for k in (0, 8) for i in (0, 8)]  # as in PTX: down, then right
    halves = [b[k : k + 8].mT for k in (0, 8)]
    tiles = [tile.reshape(32, 2) for tile in (*quarters, *halves)]
    registers = [tile.to(HALVES[name.split()[1]]).view(torch.int32) for tile in tiles]
    return torch.cat([*registers, *(tile.reshape(32, 2).float().view(torch.int32) for tile in (d[:8], d[8:]))], 1)


def formula(name: str, given: tuple[Tensor, ...]) -> Tensor:
    """[32, out], from the PTX manual: lane 4 i + j holds elements (i, 2 j) and (i, 2 j + 1) of an 8 x 8 tile."""
    if len(given) == 3:
        a, b, d = given
        product = (a @ b + d).float()  # of integers
        return torch.cat([tile.reshape(32, 2).view(torch.int32) for tile in (product[:8], product[8:])], 1)
    if name == "load_stream":
        return given[0]
    if name == "cp_async_16":
        return given[0][:, :4] * (given[0][:, 4:5] % 2 != 0)
    if name == "exp2_approx":
        y = given[0].view(torch.float32).double().exp2().float()
        return torch.where(y < torch.finfo(torch.float32).tiny, 0, y).view(torch.int32)
    tiles = given[0].view(torch.int16).view(4, 8, 8)[: PROBES[name][1]]
    if name.endswith("_trans"):
        tiles = tiles.mT
    return tiles.reshape(-1, 32, 2).transpose(0, 1).contiguous().view(torch.int32).squeeze(-1)


def differs(name: str, got: Tensor, want: Tensor) -> Tensor:
    """In any bit; but exp2 is approximate, and one NaN of its as good as another."""
    if name != "exp2_approx":
        return got != want
    return ~got.view(torch.float32).isclose(want.view(torch.float32), rtol=2**-22, atol=0, equal_nan=True)
