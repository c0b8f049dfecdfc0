"""The models of transformers that have decomposed relative positions: outputs and every gradient against stock."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from checks import assert_close_as_eager
from stock import compare, count_calls, filled, run

pytest.importorskip("transformers")

from relpos_cuda.integrations import transformers as adapter

TINY = dict(
    hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=8,
    window_size=3, global_attn_indexes=[1], mlp_dim=64, initializer_range=0.2,
)  # fmt: skip
SEGGPT = dict(image_size=(80, 40), merge_index=0, intermediate_hidden_state_indices=[1], mlp_dim=64)
SAM = {  # model: what its classes are called, up to VisionConfig
    "sam": ("SamVisionModel", "SamVisionConfig"),
    "sam_hq": ("SamHQVisionModel", "SamHQVisionConfig"),
    "got_ocr2": ("GotOcr2VisionEncoder", "GotOcr2VisionConfig"),
    "deepseek_ocr2": ("DeepseekOcr2SamVisionEncoder", "DeepseekOcr2SamVisionConfig"),
    "unlimited_ocr": ("UnlimitedOcrSamVisionEncoder", "UnlimitedOcrSamVisionConfig"),
    "slanext": ("SLANeXtVisionEncoder", "SLANeXtVisionConfig"),
}
WITH_SDPA = ("sam", "sam_hq", "deepseek_ocr2", "unlimited_ocr")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def modeling(model: str, name: str) -> type:
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)


def config(model: str, name: str, **changes: object) -> object:
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    return getattr(module, name)(**{**TINY, **changes})


def build(model: str, cls: str, configuration: str, *others: object, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    built = modeling(model, cls)
    return filled(built(config(model, configuration, **changes), *others)).eval()


def sam(implementation: str = "sdpa", **changes: object) -> nn.Module:
    return build("sam", *SAM["sam"], attn_implementation=implementation, **changes)


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# Eager classes of transformers take their softmax in float32.
@pytest.mark.parametrize(
    "model,implementation", [(m, i) for m in SAM for i in ("eager", "sdpa") if i == "eager" or m in WITH_SDPA]
)
def test_relatives_of_sam(model: str, implementation: str):
    make = lambda: build(model, *SAM[model], attn_implementation=implementation)  # noqa: E731
    report = compare(make, images(40, 40), modules=2, proven_in_float64=implementation == "sdpa")
    (kind,) = {f.kind for f in report.found}
    assert ("Sdpa" in kind) == (implementation == "sdpa")


@each_dtype
def test_sam_on_every_device(dtype: torch.dtype, device: str):
    compare(sam, images(40, 40), modules=2, dtype=dtype, device=device)


@each_dtype
@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 6), (8, 8)], ids=str)
def test_attention_on_any_grid(grid: tuple[int, int], dtype: torch.dtype, device: str):
    """Tables were made for 5 x 5: all other grids interpolate them."""
    x = torch.randn(2, *grid, 32, generator=torch.Generator().manual_seed(3))
    make = lambda: build("sam", "SamVisionSdpaAttention", "SamVisionConfig", 0)  # noqa: E731
    compare(make, x, modules=1, dtype=dtype, device=device)


def test_pp_formulanet():
    """Its encoder wants 256 channels; its layer is that of the others."""
    x = torch.randn(2, 5, 5, 32, generator=torch.Generator().manual_seed(3))
    compare(
        lambda: build("pp_formulanet", "PPFormulaNetVisionLayer", "PPFormulaNetVisionConfig", 3),
        x,
        modules=1,
        proven_in_float64=False,
    )


@each_dtype
@pytest.mark.parametrize("size", [(40, 40), (56, 24)], ids=str)
def test_vitdet(size: tuple[int, int], dtype: torch.dtype):
    positions = dict(use_relative_position_embeddings=True, window_block_indices=[0])
    compare(lambda: build("vitdet", "VitDetModel", "VitDetConfig", **positions), images(*size), modules=2, dtype=dtype)


def test_vitmatte():
    def matte() -> nn.Module:
        positions = dict(use_relative_position_embeddings=True, window_block_indices=[0], num_channels=4, patch_size=16)
        backbone = config("vitdet", "VitDetConfig", out_features=["stage2"], **positions)
        sizes = dict(hidden_size=32, convstream_hidden_sizes=[8, 8, 8], fusion_hidden_sizes=[16, 16, 8, 8])
        return build("vitmatte", "VitMatteForImageMatting", "VitMatteConfig", backbone_config=backbone, **sizes)

    x = torch.randn(1, 4, 64, 48, generator=torch.Generator().manual_seed(1))
    compare(matte, x, modules=2)


@each_dtype
def test_seggpt(dtype: torch.dtype):
    """Oblong tables: two images, one above the other."""
    inputs = [images(40, 40) + n for n in range(3)]  # image, prompt, mask of the prompt
    make = lambda: build("seggpt", "SegGptModel", "SegGptConfig", use_relative_position_embeddings=True, **SEGGPT)  # noqa: E731
    compare(make, *inputs, modules=2, dtype=dtype, proven_in_float64=False)


def test_no_relative_positions_and_no_qkv_bias():
    compare(lambda: sam(use_rel_pos=False, qkv_bias=False), images(40, 40), modules=2, fused=0)


# ---- attention weights, dropout


def test_weights_that_are_asked_for_are_those_of_stock():
    model = sam("eager")
    stock = model(images(40, 40), output_attentions=True, output_hidden_states=True)
    relpos_cuda.accelerate(model)
    for _ in range(2):  # the library's hooks stay, and must not cost the fused path
        got = model(images(40, 40), output_attentions=True, output_hidden_states=True)
        assert all(map(torch.equal, got.attentions, stock.attentions)) and len(got.attentions) == 2
        assert len(got.hidden_states) == len(stock.hidden_states)
        with count_calls() as calls:
            assert model(images(40, 40)).attentions is None
        assert calls == [2]


def test_a_hook_sees_the_weights():
    model, seen = sam("eager"), []
    relpos_cuda.accelerate(model)
    model.vision_encoder.layers[1].attn.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    with count_calls() as calls:
        model(images(40, 40))
    assert calls == [1] and seen[0].shape == (4, 25, 25)


@pytest.mark.parametrize("attention,name", [("VitDetAttention", "vitdet"), ("SegGptAttention", "seggpt")])
def test_weights_on_demand(attention: str, name: str):
    configuration = {"vitdet": "VitDetConfig", "seggpt": "SegGptConfig"}[name]
    more = dict(image_size=(40, 40), use_relative_position_embeddings=True)
    size = [(5, 5)] if name == "vitdet" else []
    module = build(name, attention, configuration, *size, **more)
    x = torch.randn(2, 5, 5, 32)
    stock = module(x, output_attentions=True), module(x)
    relpos_cuda.accelerate(module)
    assert all(map(torch.equal, module(x, output_attentions=True), stock[0]))
    ours = module(x)
    assert len(ours) == len(stock[1]) and all(a is None for a in ours[1:])
    torch.testing.assert_close(ours[0], stock[1][0])


def test_sdpa_has_no_weights():
    layer = build("sam", "SamVisionSdpaAttention", "SamVisionConfig", 0)
    relpos_cuda.accelerate(layer)
    x = torch.randn(1, 3, 3, 32)
    assert layer(x)[1] is None and layer(x, output_attentions=True)[1] is None


def test_dropout_in_training_is_that_of_stock():
    model, x = sam("eager", attention_dropout=0.5), images(40, 40)
    relpos_cuda.accelerate(model)
    with count_calls() as calls:
        model(x)
        assert calls == [2]
        model.train()
        torch.manual_seed(3)
        ours = model(x).last_hidden_state
    assert calls == [2]
    relpos_cuda.restore(model)
    torch.manual_seed(3)
    assert torch.equal(ours, model(x).last_hidden_state)


def test_autocast_and_checkpointing():
    model = sam().train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    exact = run(copy.deepcopy(model).double(), images(40, 40).double())
    with torch.autocast("cpu", torch.bfloat16):
        rival = run(model, images(40, 40))
        relpos_cuda.accelerate(model)
        got = run(model, images(40, 40))
    for name in exact:
        assert got[name].dtype == rival[name].dtype
        rounded = [t.bfloat16() for t in (got[name], rival[name])]  # one rounding is one of bfloat16
        assert_close_as_eager(*rounded, exact[name], name)


def test_the_classes_are_those_of_the_library():
    """Every name of the adapter is a class with a forward of its own; every such class has a name there."""
    named = {name for a in adapter.ADAPTERS for name in a.classes}
    models = {name.split(".")[2] for name in named}  # an older release lacks some
    models = {model for model in models if importlib.util.find_spec(f"transformers.models.{model}")}
    named = {name for name in named if name.split(".")[2] in models}
    there = set()
    for model in models:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        there |= {
            f"{c.__module__}.{c.__qualname__}"
            for c in classes
            if "forward" in vars(c) and {"rel_pos_h", "rel_pos_w"} <= set(c.forward.__code__.co_names)
        }
    assert named == there
