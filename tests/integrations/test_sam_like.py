"""Copies of segment_anything's encoder: in kornia and ultralytics, in Cellpose, and in forks that nobody listed."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relpos_cuda
from packages import bare
from relpos_cuda.integrations import sam_like
from stock import compare, filled

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "out_chans": 16, "use_rel_pos": True}
LIBRARIES = {
    "kornia.models.sam.architecture.image_encoder": "kornia.models.sam.architecture.image_encoder.Attention",
    "ultralytics.models.sam.modules.encoders": "ultralytics.models.sam.modules.blocks.REAttention",
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quiet_ultralytics(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """On import it asks the network whether it is there, and writes its settings."""
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, quiet_ultralytics: None) -> Any:
    pytest.importorskip(request.param.partition(".")[0])
    return importlib.import_module(request.param)


def encoder(library: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 40, "patch_size": 8, "window_size": 3, "global_attn_indexes": (1,), "use_abs_pos": False}
    return filled(library.ImageEncoderViT(**sizes, **TINY))


@pytest.mark.parametrize("height, width", [(40, 40), (56, 32)])
def test_encoder(library: Any, height: int, width: int):
    report = compare(lambda: encoder(library), drawn(2, 3, height, width), modules=3, dtype=torch.float64)
    assert {f.library for f in report.found} == {"segment_anything"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer(library: Any, dtype: torch.dtype):
    compare(lambda: encoder(library).blocks[1].attn, drawn(2, 7, 4, 32), modules=1, dtype=dtype)


def test_classes_are_listed(library: Any):
    """So that they are known by name, and need no probe."""
    attention = type(encoder(library).blocks[1].attn)
    assert f"{attention.__module__}.{attention.__qualname__}" == LIBRARIES[library.__name__]
    assert LIBRARIES[library.__name__] in sam_like.LISTED


def test_cellpose(monkeypatch: pytest.MonkeyPatch):
    """It makes every window of a ViT-L global, whose tables are then of three times the length."""
    bare("cellpose")
    vit = importlib.import_module("cellpose.vit")
    from segment_anything.modeling import ImageEncoderViT

    def cellpose() -> nn.Module:
        torch.manual_seed(0)
        small = ImageEncoderViT(window_size=14, global_attn_indexes=(1,), **TINY)
        monkeypatch.setitem(vit.sam_model_registry, "vit_l", lambda _: SimpleNamespace(image_encoder=small))
        return filled(vit.CPSAM(bsize=64)).eval()

    assert [len(block.attn.rel_pos_h) for block in cellpose().encoder.blocks] == [27, 127, 27]
    compare(cellpose, drawn(2, 3, 64, 64), modules=3, dtype=torch.float64)


def add_decomposed_rel_pos(
    logits: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size: tuple[int, int], k_size: tuple[int, int]
) -> Tensor:
    rel_h, rel_w = relpos_cuda.decomposed_rel_pos(q, rel_pos_h, rel_pos_w, q_size, k_size)
    return (logits.unflatten(-1, k_size) + rel_h[..., None] + rel_w[..., None, :]).flatten(-2)


class Fork(nn.Module):
    """Of MedSAM's shape: the names are those of segment_anything, and so is what it computes."""

    def __init__(self, use_rel_pos: bool = True):
        super().__init__()
        self.num_heads, self.scale, self.use_rel_pos = 2, 16**-0.5, use_rel_pos
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        if use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = nn.Parameter(torch.zeros(9, 16)), nn.Parameter(torch.zeros(9, 16))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * self.num_heads, height * width, -1).unbind(0)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.use_rel_pos:
            size = height, width
            logits = add_decomposed_rel_pos(logits, q, self.rel_pos_h, self.rel_pos_w, size, size)
        x = (logits.softmax(dim=-1) @ v).view(batch, self.num_heads, height, width, -1)
        return self.proj(x.permute(0, 2, 3, 1, 4).reshape(batch, height, width, dim))


class Child(Fork):
    """Inherits the forward."""


def variant(old: str, new: str) -> type[Fork]:
    """A fork whose forward differs in one place."""
    source = textwrap.dedent(inspect.getsource(Fork.forward))
    assert source.count(old) == 1
    scope = dict(globals())
    exec(source.replace(old, new), scope)
    return type("Variant", (Fork,), {"forward": scope["forward"]})


def fork(cls: type[Fork], **more: bool) -> nn.Module:
    torch.manual_seed(0)
    return filled(nn.Sequential(cls(**more)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [Fork, Child])
@pytest.mark.parametrize("height, width", [(5, 5), (4, 7)])
def test_forks_are_recognised(cls: type[Fork], height: int, width: int, dtype: torch.dtype):
    report = compare(lambda: fork(cls), drawn(2, height, width, 32), modules=1, dtype=dtype)
    assert [(f.name, f.kind, f.library) for f in report.found] == [("0", cls.__name__, "segment_anything")]


def test_forks_without_tables_are_recognised():
    compare(lambda: fork(Fork, use_rel_pos=False), drawn(2, 4, 7, 32), modules=1, fused=0)


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("(logits, q, self", "(logits, q * self.scale, self", "has the names of segment_anything's, but other results"),
        ("self.rel_pos_h, self.rel_pos_w", "self.rel_pos_w, self.rel_pos_h", "but other results"),
        ("q, k, v = ", "q, v, k = ", "but other results"),
        ("size = height, width", "size = height, height", "but raises ValueError"),
        ("@ k.", "@ k.roll(1, -2).", "its class is not known"),
    ],
    ids=["scaled", "swapped", "keys_as_values", "square", "renamed"],
)
def test_forks_that_compute_something_else_are_left_alone(old: str, new: str, reason: str):
    report = relpos_cuda.accelerate(model := fork(variant(old, new)))
    assert [(f.kind, f.replaced) for f in report.found] == [("Variant", False)]
    assert reason in report.found[0].reason
    assert "forward" not in vars(model[0])


def test_probing_changes_nothing():
    model, hooked = fork(Fork), []
    for part in model.modules():
        part.register_forward_hook(lambda *_: hooked.append(1))
        part.register_forward_pre_hook(lambda *_: hooked.append(1))
    model[0].proj.register_buffer("seen", torch.zeros(()))
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    dictionaries = {id(part._parameters): dict(part._parameters) for part in model.modules()}
    twin = sam_like.twin_of(model[0])
    assert not {id(part._parameters) for part in twin.modules()} & dictionaries.keys(), "other threads may be reading"
    assert twin.proj.weight is model[0].proj.weight and twin.proj.seen is not model[0].proj.seen
    assert len(relpos_cuda.accelerate(model).replaced) == 1
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert {id(part._parameters): dict(part._parameters) for part in model.modules()} == dictionaries
    assert torch.equal(state, torch.get_rng_state())
    assert not hooked


class Wrapped(nn.Module):
    """A Linear as LoRA wraps it: without the attributes of one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_forks_are_recognised_whatever_the_surroundings():
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        model = fork(Fork)
        model[0].proj = Wrapped(model[0].proj)
        assert len(relpos_cuda.accelerate(model).replaced) == 1
