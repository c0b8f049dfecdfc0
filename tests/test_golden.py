"""Numbers computed by the original libraries (tests/golden, see its README)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import relpos_cuda
from checks import assert_close_as_eager
from relpos_cuda import reference

GOLDEN = Path(__file__).parent / "golden"
FILES = {path.stem: path for path in sorted(GOLDEN.glob("*.npz"))}
LOGITS = [name for name in FILES if "attn" not in name and "sdpa" not in name and "tables" not in name]
ATTENTION = [name for name in FILES if name.startswith(("hf_attn", "hf_sdpa"))]


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    with np.load(FILES[name]) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def grids(arrays: dict, meta: dict) -> dict:
    if "rel_pos_t" not in arrays:
        return {"q_size": tuple(meta["q_size"]), "k_size": tuple(meta["k_size"])}
    return {"q_size": tuple(meta["q_thw"]), "k_size": tuple(meta["k_thw"])}


def test_all_files_are_used():
    assert len(FILES) == 17
    assert len(LOGITS) == 8 and len(ATTENTION) == 8


def logits(function, arrays: dict, meta: dict, dtype: torch.dtype, device: str = "cpu", **more) -> dict:
    names = [n for n in ("attn", "q", "rel_pos_h", "rel_pos_w", "rel_pos_t") if n in arrays]
    leaves = {n: arrays[n].to(device, dtype, copy=True).requires_grad_() for n in names}
    out = function(
        leaves["attn"] * 1,
        leaves["q"],
        leaves["rel_pos_h"],
        leaves["rel_pos_w"],
        **grids(arrays, meta),
        rel_pos_t=leaves.get("rel_pos_t"),
        num_prefix_tokens=int(meta["kind"].startswith("logits_cls")),
        **more,
    )
    grads = torch.autograd.grad(out, list(leaves.values()), arrays["grad_out"].to(device, dtype))
    return {"out": out, **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", LOGITS)
def test_logits(name: str, inplace: bool, device: str):
    arrays, meta = load(name)
    arrays["dattn"] = arrays["grad_out"]
    exact = logits(reference.add_decomposed_rel_pos, arrays, meta, torch.float64)
    got = logits(relpos_cuda.add_decomposed_rel_pos, arrays, meta, torch.float32, device, inplace=inplace)
    for key, value in got.items():
        assert_close_as_eager(value, arrays[key], exact[key], key)


def attention(function, arrays: dict, meta: dict, dtype: torch.dtype, device: str = "cpu") -> dict:
    names = ("q", "k", "v", "rel_pos_h", "rel_pos_w")
    leaves = {n: arrays[n].to(device, dtype, copy=True).requires_grad_() for n in names}
    out = function(*leaves.values(), **grids(arrays, meta), scale=meta["scale"])
    grads = torch.autograd.grad(out, list(leaves.values()), arrays["grad_out"].to(device, dtype))
    return {"out": out, **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}


def on_the_logits_op(q, k, v, *tables, scale: float, **grids) -> torch.Tensor:
    logits = relpos_cuda.add_decomposed_rel_pos((q * scale) @ k.mT, q, *tables, **grids, inplace=True)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_built_on_the_logits_op(name: str, device: str):
    compare_attention(on_the_logits_op, name, device)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, device: str):
    compare_attention(relpos_cuda.rel_pos_attention, name, device)


def compare_attention(function, name: str, device: str) -> None:
    arrays, meta = load(name)
    exact = attention(reference.rel_pos_attention, arrays, meta, torch.float64)
    got = attention(function, arrays, meta, torch.float32, device)
    largest = max(e.abs().max().item() for e in exact.values())
    for key, value in got.items():
        if exact[key].abs().max() < 1e-9 * largest:  # one row of keys: its gradient is zero up to rounding
            assert value.abs().max() <= 64 * torch.finfo(torch.float32).eps * largest, key
        else:
            assert_close_as_eager(value, arrays[key], exact[key], key)


def table_cases() -> list[tuple[int, int, int]]:
    arrays, _ = load("hf_get_rel_pos_tables")
    return [tuple(map(int, key.split("_")[1:])) for key in arrays if key.startswith("R_")]


@pytest.mark.parametrize("q,k,rows", table_cases())
def test_get_rel_pos(q: int, k: int, rows: int):
    arrays, _ = load("hf_get_rel_pos_tables")
    assert torch.equal(relpos_cuda.tables.index(q, k), arrays[f"index_{q}_{k}"].long())
    table = arrays[f"table_{q}_{k}_{rows}"]
    assert torch.equal(relpos_cuda.tables.resize(table, 2 * max(q, k) - 1), arrays[f"resized_{q}_{k}_{rows}"])
    assert torch.equal(relpos_cuda.get_rel_pos(q, k, table), arrays[f"R_{q}_{k}_{rows}"])
