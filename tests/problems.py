"""Named problems: real model shapes, ragged ones, and tiny ones that reach every branch of the kernels."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

NAMES = ("out", "attn", "q", "rel_pos_h", "rel_pos_w", "rel_pos_t")
ATTENTION_NAMES = ("out", "q", "k", "v", "rel_pos_h", "rel_pos_w", "rel_pos_t")
NO_WORK_SPACES = (None,) * 4  # of attention_bwd: factors, partials, columns, lines


@dataclasses.dataclass(frozen=True)
class Problem:
    name: str
    q_size: tuple[int, ...]
    k_size: tuple[int, ...]
    head_dim: int
    batch: int = 1
    heads: int = 2
    prefix: int = 0
    table: int | None = None  # rows of every table, if they are to be interpolated

    def __str__(self) -> str:
        return self.name

    @property
    def rows(self) -> int:
        return self.prefix + math.prod(self.q_size)

    @property
    def columns(self) -> int:
        return self.prefix + math.prod(self.k_size)

    def table_rows(self, axis: int) -> int:
        return self.table or 2 * max(self.q_size[axis], self.k_size[axis]) - 1


def same(name: str, h: int, w: int, head_dim: int, **more: int) -> Problem:
    return Problem(name, (h, w), (h, w), head_dim, **more)


# What users run, fewer heads; one group of the largest grids is 67 MB of float32 logits.
MODELS = [
    same("sam_b_window", 14, 14, 64, batch=3, heads=12),
    same("sam_l_window", 14, 14, 64, batch=2, heads=16),
    same("sam_h_window", 14, 14, 80, batch=2, heads=4),
    same("sam_b_global", 64, 64, 64, heads=1),
    same("sam_l_global", 64, 64, 64, heads=2),
    same("sam_h_global", 64, 64, 80, heads=1),
    same("deepseek_ocr_48", 48, 48, 64, heads=1),
    same("cellpose_32_interpolated", 32, 32, 64, heads=2, table=127),
    same("slimsam_window", 14, 14, 14, batch=2, heads=3),
    same("slimsam50_window", 14, 14, 32, batch=2, heads=3),
    Problem("seggpt", (56, 28), (56, 28), 64, heads=1),
    Problem("mvitv2_stage1", (56, 56), (14, 14), 96, heads=1),
    Problem("mvitv2_stage1_cls", (56, 56), (14, 14), 96, heads=1, prefix=1),
    Problem("mvitv2_stage3_up", (14, 14), (28, 28), 96, heads=2),
    Problem("mvitv2_large_cls", (7, 7), (14, 14), 72, batch=2, heads=3, prefix=1),
    Problem("slowfast_fraction", (39, 39), (10, 10), 72, heads=1),
    Problem("video_cls", (8, 14, 14), (8, 7, 7), 96, heads=1, prefix=1),
]

# Ragged and odd: every kernel, the emulated ones too, runs all of them.
TINY = [
    same("ragged_5x13", 5, 13, 14, batch=2, heads=3),
    same("ragged_5x13_mma", 5, 13, 48, batch=2),
    same("row_1x7", 1, 7, 32),
    same("many_groups", 4, 4, 8, batch=8, heads=8),
    same("column_7x1", 7, 1, 8, batch=2),
    same("point_1x1", 1, 1, 16, batch=2),
    same("lanes_8x8", 8, 8, 64, batch=2),
    same("lanes_4x16", 4, 16, 72),
    same("window_7x7", 7, 7, 80, batch=2),
    same("long_3x40", 3, 40, 96),
    same("longer_than_a_buffer", 1, 520, 8, heads=1),
    Problem("one_row_per_block", (1, 2), (1, 12000), 8, heads=1, prefix=1),
    same("odd_dim_1", 3, 4, 1),
    same("odd_dim_33", 6, 5, 33),
    same("wide_dim_136", 4, 6, 136),
    same("wide_dim_130", 4, 6, 130),
    same("two_class_tokens", 4, 5, 24, batch=2, prefix=2),
    Problem("class_tokens_fill_a_tile", (2, 3), (3, 2), 8, prefix=70),
    same("interpolated", 10, 6, 16, table=27),
    Problem("keys_fewer", (8, 20), (2, 5), 16),
    Problem("keys_more", (3, 4), (6, 8), 40, prefix=1),
    Problem("fraction_9x7_5x3", (9, 7), (5, 3), 16),
    Problem("axes_disagree", (8, 2), (2, 8), 24, batch=2),
    Problem("video", (2, 4, 3), (2, 2, 3), 24, batch=2),
    Problem("video_lanes", (2, 3, 2), (2, 2, 128), 8, heads=1),
    Problem("video_cls_interpolated", (3, 4, 4), (2, 4, 4), 16, prefix=17, table=9),
    same("blocks_of_keys_4x20", 4, 20, 24),
]


def with_enough_numbers(p: Problem) -> Problem:
    """More groups for small problems: the largest error of a few numbers is luck, ours and the rival's."""
    numbers = p.heads * p.rows * p.head_dim
    return dataclasses.replace(p, batch=min(16, 1 + 10000 // numbers)) if p.batch * numbers < 5000 else p


def vanishes(p: Problem, name: str) -> bool:
    """Whether the exact gradient of attention is zero: by luck the rival's may be, too.

    A bias that is the same for all keys, or for all but a class token among a thousand, changes nothing.
    """
    if p.columns == 1:
        return name in ("q", "k") or name.startswith("rel_pos")
    axis = {"rel_pos_h": -2, "rel_pos_w": -1, "rel_pos_t": -3}.get(name)
    return axis is not None and p.k_size[axis] == 1 and p.prefix * 1000 < p.columns


@dataclasses.dataclass
class Inputs:
    """Everything one run needs, in float64, but already rounded to the dtype under test."""

    attn: Tensor
    q: Tensor
    tables: list[Tensor]  # h, w(, t)
    grad: Tensor

    def leaves(self, dtype: torch.dtype, device: str, attn_dtype: torch.dtype | None = None) -> list[Tensor]:
        attn = self.attn.to(device, attn_dtype or dtype, copy=True)
        others = [t.to(device, dtype, copy=True) for t in (self.q, *self.tables)]
        return [t.requires_grad_() for t in (attn, *others)]


def draw(problem: Problem, dtype: torch.dtype, attn_dtype: torch.dtype | None = None, seed: int = 0) -> Inputs:
    """Normal queries and logits; tables with std D**-0.5, so that the bias is about as large as the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).double()

    p, attn_dtype = problem, attn_dtype or dtype
    groups = (p.batch, p.heads)
    tables = [normal(p.table_rows(axis), p.head_dim) for axis in range(len(p.q_size))]
    tables = [(t * p.head_dim**-0.5).to(dtype).double() for t in tables]
    return Inputs(
        attn=normal(*groups, p.rows, p.columns, to=attn_dtype),
        q=normal(*groups, p.rows, p.head_dim),
        tables=[*tables[-2:], *tables[:-2]],
        grad=normal(*groups, p.rows, p.columns, to=attn_dtype),
    )


def call(function, problem: Problem, attn: Tensor, q: Tensor, tables: list[Tensor], **more) -> Tensor:
    """The public signature, with the tables of a problem."""
    t = tables[2] if len(tables) == 3 else None
    return function(
        attn,
        q,
        tables[0],
        tables[1],
        problem.q_size,
        problem.k_size,
        rel_pos_t=t,
        num_prefix_tokens=problem.prefix,
        **more,
    )


def run(
    function,
    problem: Problem,
    inputs: Inputs,
    dtype: torch.dtype,
    device: str = "cpu",
    attn_dtype: torch.dtype | None = None,
    **more,
) -> list[Tensor]:
    """``out`` and the gradients of logits, q and every table, in the order of NAMES."""
    leaves = inputs.leaves(dtype, device, attn_dtype)
    attn, q, *tables = leaves
    out = call(function, problem, attn * 1, q, tables, **more)  # no leaf: in place is allowed
    grads = torch.autograd.grad(out, leaves, inputs.grad.to(device, out.dtype))
    return [out, *grads]


# ---- attention


@dataclasses.dataclass
class AttentionInputs:
    """As Inputs; ``tensors`` are q, k, v and the tables h, w(, t)."""

    tensors: list[Tensor]
    grad: Tensor

    def leaves(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        return [t.to(device, dtype, copy=True).requires_grad_() for t in self.tensors]


def draw_attention(problem: Problem, dtype: torch.dtype, seed: int = 0) -> AttentionInputs:
    p, generator = problem, torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype).double()

    queries = (p.batch, p.heads, p.rows, p.head_dim)
    keys = (p.batch, p.heads, p.columns, p.head_dim)
    tables = [normal(p.table_rows(axis), p.head_dim, std=p.head_dim**-0.5) for axis in range(len(p.q_size))]
    return AttentionInputs(
        tensors=[normal(*queries), normal(*keys), normal(*keys), *tables[-2:], *tables[:-2]],
        grad=normal(*queries),
    )


def with_large_bias(inputs: AttentionInputs) -> None:
    for table in inputs.tensors[3:]:
        table *= 8


def with_huge_logit(inputs: AttentionInputs) -> None:
    inputs.tensors[0][0, 0, 5] *= 64
    inputs.tensors[1][0, 0, 11] *= 64


def with_small_logits(inputs: AttentionInputs) -> None:
    """All far below zero: what pads a tile would win every softmax."""
    inputs.tensors[0] = inputs.tensors[0].abs() + 4
    inputs.tensors[1] = -inputs.tensors[1].abs() - 4


EXTREMES = (with_large_bias, with_huge_logit, with_small_logits)


def packed(tensors: list[Tensor]) -> list[Tensor]:
    """q, k, v as views of one [B, S, 3, heads, D], as models produce them."""
    qkv = torch.stack([t.transpose(1, 2) for t in tensors[:3]], dim=2)
    return [*qkv.permute(2, 0, 3, 1, 4), *tensors[3:]]


def call_attention(function, problem: Problem, tensors: list[Tensor], **more) -> Tensor:
    """The public signature, with the tables of a problem."""
    t = tensors[5] if len(tensors) == 6 else None
    grids = (problem.q_size, problem.k_size)
    return function(*tensors[:5], *grids, rel_pos_t=t, num_prefix_tokens=problem.prefix, **more)


def run_attention(
    function, problem: Problem, inputs: AttentionInputs, dtype: torch.dtype, device: str = "cpu", **more
) -> list[Tensor]:
    """``out`` and the gradients of q, k, v and every table, in the order of ATTENTION_NAMES."""
    leaves = inputs.leaves(dtype, device)
    out = call_attention(function, problem, leaves, **more)
    return [out, *torch.autograd.grad(out, leaves, inputs.grad.to(device, out.dtype))]
