"""Named shapes of the benchmarks, each one layer of a real model, and the tensors drawn for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from relpos_cuda import tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Grid = tuple[int, int]
LEAVES = ("q", "k", "v", "rel_pos_h", "rel_pos_w")


@dataclass(frozen=True)
class Case:
    """A layer: windows count as batch, class tokens (``prefix``) come before the grid of both queries and keys."""

    name: str
    batch: int
    heads: int
    q_size: Grid
    k_size: Grid
    head_dim: int
    prefix: int = 0

    @property
    def groups(self) -> int:
        return self.batch * self.heads

    @property
    def rows(self) -> int:
        return self.prefix + math.prod(self.q_size)

    @property
    def columns(self) -> int:
        return self.prefix + math.prod(self.k_size)

    def __str__(self) -> str:
        grids = "{}x{}".format(*self.q_size)
        if self.k_size != self.q_size:
            grids += " <- {}x{}".format(*self.k_size)
        prefix = f" + {self.prefix} class token" if self.prefix else ""
        return f"{self.name}: {self.groups} x {grids}{prefix}, D {self.head_dim}"


def square(name: str, batch: int, heads: int, side: int, head_dim: int) -> Case:
    return Case(name, batch, heads, (side, side), (side, side), head_dim)


CASES = {
    case.name: case
    for case in (
        square("sam_b_global", 1, 12, 64, 64),
        square("sam_b_global_batch8", 8, 12, 64, 64),
        square("sam_l_global", 1, 16, 64, 64),
        square("sam_h_global", 1, 16, 64, 80),
        square("sam_b_windows", 25, 12, 14, 64),
        square("sam_l_windows", 25, 16, 14, 64),
        square("sam_h_windows", 25, 16, 14, 80),
        square("sam_h_windows_batch8", 200, 16, 14, 80),
        square("deepseek_ocr_768", 1, 12, 48, 64),
        square("cellpose_sam", 1, 16, 32, 64),
        Case("vitdet_oblong", 1, 16, (50, 76), (50, 76), 64),
        Case("mvitv2_stage1", 32, 1, (56, 56), (14, 14), 96),
        Case("mvitv2_stage2_cls", 32, 2, (28, 28), (14, 14), 96, prefix=1),
        Case("mvitv2_stage3_cls", 32, 4, (14, 14), (14, 14), 96, prefix=1),
    )
}
ON_CPU = ("deepseek_ocr_768", "sam_b_windows", "mvitv2_stage1")  # what fits ten minutes of two cores
QUICK = ("sam_b_windows",)
COMPILED_ON_GPU = ("sam_b_global", "sam_h_global", "sam_h_windows")  # torch.compile tries many kernels for each


@dataclass(frozen=True)
class Inputs:
    """What one call of a peer gets; leaves that want gradients."""

    case: Case
    q: Tensor  # [B, heads, S_q, D]
    k: Tensor  # [B, heads, S_k, D]
    v: Tensor
    rel_pos_h: Tensor  # [2K - 1, D]
    rel_pos_w: Tensor
    index_h: Tensor  # [q_size[0], k_size[0]], rows of rel_pos_h, for those who gather them
    index_w: Tensor
    grad: Tensor  # of the result
    attn: Tensor | None = None  # [B, heads, S_q, S_k], for the logits op

    @property
    def tables_and_grids(self) -> tuple[Tensor, Tensor, Grid, Grid]:
        return self.rel_pos_h, self.rel_pos_w, self.case.q_size, self.case.k_size

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.rel_pos_h, self.rel_pos_w

    def detached(self) -> Inputs:
        """For what refuses tensors that want gradients, even where none are recorded."""
        return dataclasses.replace(self, **{name: getattr(self, name).detach() for name in LEAVES})


def draw(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Standard normal q, k, v; tables whose bias is about as large as the logits.

    Where queries and keys are the same tokens, q, k and v are views of one packed tensor, as in the models.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    def heads_of(*shape: int) -> Iterable[Tensor]:
        """[parts, B, heads, S, D] as the projection of [B, S, parts * heads * D] lays them out."""
        return normal(*shape).permute(2, 0, 3, 1, 4)

    tokens = case.heads, case.head_dim
    if case.q_size == case.k_size:
        q, k, v = heads_of(case.batch, case.rows, 3, *tokens)
    else:
        (q,) = heads_of(case.batch, case.rows, 1, *tokens)
        k, v = heads_of(case.batch, case.columns, 2, *tokens)
    axes = list(zip(case.q_size, case.k_size, strict=True))
    rel_pos = (normal(tables.rows_of(*axis), case.head_dim) * case.head_dim**-0.5 for axis in axes)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *rel_pos)]
    index = [tables.index(*axis).to(device) for axis in axes]
    return Inputs(case, *leaves, *index, grad=normal(case.batch, case.rows, *tokens).transpose(1, 2))
