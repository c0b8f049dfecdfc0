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
LOGITS = [name for name in FILES if "logits" in name or "mvitv2" in name]
ATTENTION = [name for name in FILES if name.startswith(("hf_attn", "hf_sdpa"))]
TABLES, ENCODER = "hf_get_rel_pos_tables", "hf_sam_encoder_8x8_w3"
LEARNED = ("rel_pos_h", "rel_pos_w")


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    with np.load(FILES[name]) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def grids(arrays: dict, meta: dict) -> dict:
    if "rel_pos_t" not in arrays:
        return {"q_size": tuple(meta["q_size"]), "k_size": tuple(meta["k_size"])}
    return {"q_size": tuple(meta["q_thw"]), "k_size": tuple(meta["k_thw"])}


def test_all_files_are_used():
    assert sorted([*LOGITS, *ATTENTION, TABLES, ENCODER]) == list(FILES)
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
    exact, eager = (logits(reference.add_decomposed_rel_pos, arrays, meta, d) for d in (torch.float64, torch.float32))
    got = logits(relpos_cuda.add_decomposed_rel_pos, arrays, meta, torch.float32, device, inplace=inplace)
    for key, value in got.items():
        assert_close_as_eager(arrays[key], eager[key], exact[key], f"{key} of the file")
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
    exact, eager = (attention(reference.rel_pos_attention, arrays, meta, d) for d in (torch.float64, torch.float32))
    got = attention(function, arrays, meta, torch.float32, device)
    largest = max(e.abs().max().item() for e in exact.values())
    for key, value in got.items():
        if exact[key].abs().max() < 1e-9 * largest:  # one row of keys: its gradient is zero up to rounding
            assert value.abs().max() <= 64 * torch.finfo(torch.float32).eps * largest, key
        else:
            assert_close_as_eager(arrays[key], eager[key], exact[key], f"{key} of the file")
            assert_close_as_eager(value, arrays[key], exact[key], key)


def table_cases() -> list[tuple[int, int, int]]:
    arrays, _ = load(TABLES)
    return [tuple(map(int, key.split("_")[1:])) for key in arrays if key.startswith("R_")]


@pytest.mark.parametrize("q,k,rows", table_cases())
def test_get_rel_pos(q: int, k: int, rows: int):
    arrays, _ = load(TABLES)
    assert torch.equal(relpos_cuda.tables.index(q, k), arrays[f"index_{q}_{k}"].long())
    table = arrays[f"table_{q}_{k}_{rows}"]
    assert torch.equal(relpos_cuda.tables.resize(table, 2 * max(q, k) - 1), arrays[f"resized_{q}_{k}_{rows}"])
    assert torch.equal(relpos_cuda.get_rel_pos(q, k, table), arrays[f"R_{q}_{k}_{rows}"])


def encoder_as_shipped(arrays: dict, meta: dict) -> torch.nn.Module:
    """Two layers: one with windows that do not divide the grid, one over the whole grid."""
    pytest.importorskip("transformers")
    modeling_sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    weights = {name.removeprefix("param:"): a for name, a in arrays.items() if name.startswith("param:")}
    weights |= {f"layers.{i}.attn.{name}": arrays[f"layer{i}_{name}"] for i in (0, 1) for name in LEARNED}
    config = modeling_sam.SamVisionConfig(
        hidden_size=meta["config"]["hidden_size"],
        num_attention_heads=meta["config"]["heads"],
        window_size=meta["config"]["window"],
        num_hidden_layers=2,
        global_attn_indexes=[1],
        mlp_dim=len(weights["layers.0.mlp.lin1.bias"]),
        output_channels=len(weights["neck.layer_norm1.bias"]),
        patch_size=weights["patch_embed.projection.weight"].shape[-1],
        image_size=arrays["pixel_values"].shape[-1],
        attn_implementation="eager",
    )
    model = modeling_sam.SamVisionEncoder(config)
    model.load_state_dict(weights)
    return model


def run_encoder(model: torch.nn.Module, arrays: dict, dtype: torch.dtype, device: str = "cpu") -> dict:
    """All that the file has: what goes through the layers, the output, the gradients of the tables."""
    model = model.to(device, dtype)
    got = {}
    for i, layer in enumerate(model.layers):
        layer.attn.qkv.register_forward_hook(lambda _, x, out, i=i: got.update({f"layer{i}_qkv": out}))
        layer.attn.proj.register_forward_pre_hook(lambda _, x, i=i: got.update({f"layer{i}_attn_out": x[0]}))
    tables = {f"dlayer{i}_{name}": getattr(model.layers[i].attn, name) for i in (0, 1) for name in LEARNED}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # for the convolutions, on a GPU
        out = model(arrays["pixel_values"].to(device, dtype)).last_hidden_state
        grads = torch.autograd.grad(out, list(tables.values()), arrays["grad_out"].to(device, dtype))
    return {**got, "last_hidden_state": out, **dict(zip(tables, grads, strict=True))}


def test_the_file_of_the_encoder_is_read_as_it_was_written():
    """Its numbers are judged here, by the library's model: another config would move its float64 with it."""
    arrays, meta = load(ENCODER)
    exact, eager = (
        run_encoder(encoder_as_shipped(arrays, meta), arrays, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert len(exact) == 9
    for key, value in eager.items():
        assert_close_as_eager(arrays[key], value, exact[key], key)


def test_encoder_accelerated(device: str):
    arrays, meta = load(ENCODER)
    exact = run_encoder(encoder_as_shipped(arrays, meta), arrays, torch.float64)
    model = encoder_as_shipped(arrays, meta)
    assert len(relpos_cuda.accelerate(model).replaced) == len(model.layers)
    for key, value in run_encoder(model, arrays, torch.float32, device).items():
        assert_close_as_eager(value, arrays[key], exact[key], key)
