"""SAM of transformers, patched: the library's own results, from the library's own modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from checks import assert_close_as_eager

pytest.importorskip("transformers")
modeling_sam = pytest.importorskip("transformers.models.sam.modeling_sam")

from transformers import SamVisionConfig, SamVisionModel  # noqa: E402

from relpos_cuda.integrations import transformers as integration  # noqa: E402

CONFIG = dict(
    hidden_size=32, output_channels=16, num_hidden_layers=3, num_attention_heads=2, image_size=40,
    patch_size=8, window_size=3, global_attn_indexes=[1], mlp_dim=64, initializer_range=0.2,
)  # fmt: skip
LAYERS, GRID, HEAD_DIM = (
    CONFIG["num_hidden_layers"],
    5,
    16,
)  # a grid of 5 x 5: windows of 3 are padded

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_class = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def filled(module: nn.Module) -> nn.Module:
    """Tables, and everything else that the library starts at zero, drawn at random."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("rel_pos_h", "rel_pos_w", "pos_embed", "bias")):
                p.copy_(torch.randn(p.shape, generator=draw) * HEAD_DIM**-0.5)
    return module


def vision_model(implementation: str = "eager", **changes: object) -> SamVisionModel:
    torch.manual_seed(0)
    config = SamVisionConfig(**{**CONFIG, **changes}, attn_implementation=implementation)
    return filled(SamVisionModel(config)).eval()


def attention(window: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = SamVisionConfig(**{**CONFIG, **changes})
    return filled(modeling_sam.SamVisionAttention(config, window_size=window)).eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of every parameter and of the input under a fixed cotangent."""
    x = x.clone().requires_grad_()
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out.last_hidden_state
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    module.zero_grad()
    (out * weight).sum().backward()
    grads = {f"gradient of {n}": p.grad.clone() for n, p in module.named_parameters()}
    return {"output": out.detach(), "gradient of the input": x.grad, **grads}


def compare(stock: nn.Module, patched: nn.Module, x: Tensor, dtype: torch.dtype, device: str) -> None:
    """Stock and patched in ``dtype`` against stock in float64, all from the same numbers."""
    stock, patched, x = stock.to(dtype), patched.to(dtype), x.to(dtype)
    exact = run(copy.deepcopy(stock).double(), x.double())  # on the CPU
    stock, patched, x = stock.to(device), patched.to(device), x.to(device)
    rival = run(stock, x)
    number = integration.patch(patched)
    assert number == sum(hasattr(m, "rel_pos_h") for m in patched.modules())
    got = run(patched, x)
    assert exact.keys() == rival.keys() == got.keys()
    for name in exact:
        assert_close_as_eager(got[name], rival[name], exact[name], name)


@each_dtype
@each_class
def test_model_and_every_gradient(implementation: str, dtype: torch.dtype, real_device: str) -> None:
    compare(vision_model("eager"), vision_model(implementation), pixels(), dtype, real_device)


@each_dtype
@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 6), (8, 8)], ids=str)
def test_attention_on_any_grid(grid: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Tables were made for 5 x 5: all other grids interpolate them."""
    x = torch.randn(2, *grid, 32, generator=torch.Generator().manual_seed(3))
    compare(attention(), attention(), x, dtype, device)


@each_dtype
def test_tables_of_another_size(dtype: torch.dtype, real_device: str) -> None:
    def resized() -> nn.Module:
        model = vision_model()
        for module in model.modules():
            if hasattr(module, "rel_pos_h"):
                module.rel_pos_h = nn.Parameter(torch.zeros(2 * 8 - 1, HEAD_DIM))
                module.rel_pos_w = nn.Parameter(torch.zeros(2 * 2 - 1, HEAD_DIM))
        return filled(model)

    compare(resized(), resized(), pixels(), dtype, real_device)


def test_no_relative_positions_and_no_qkv_bias() -> None:
    def plain() -> nn.Module:
        return attention(use_rel_pos=False, qkv_bias=False)

    x = torch.randn(2, 4, 4, 32)
    stock, patched = plain(), plain()
    assert integration.patch(patched) == 1
    assert all(map(torch.equal, patched(x), stock(x)))


@each_class
def test_the_op_is_called_once_per_layer(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = {"eager": "add_decomposed_rel_pos", "sdpa": "rel_pos_attention"}[implementation]
    calls: list[dict] = []

    def spy(*args: object, **more: object) -> Tensor:
        calls.append(more)
        return original(*args, **more)

    original: Callable[..., Tensor] = getattr(integration, op)
    monkeypatch.setattr(integration, op, spy)
    model = vision_model(implementation)
    with torch.no_grad():
        model(pixels())
        assert calls == []
        integration.patch(model)
        model(pixels())
    more = {"eager": {"inplace": True}, "sdpa": {"scale": HEAD_DIM**-0.5}}[implementation]
    assert calls == [more] * LAYERS


@each_class
def test_unpatch_restores_every_bit(implementation: str) -> None:
    model = vision_model(implementation)
    before = run(model, pixels())
    assert integration.patch(model) == LAYERS
    run(model, pixels())
    assert integration.unpatch(model) == LAYERS
    after = run(model, pixels())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(m) for m in model.modules())
    assert integration.unpatch(model) == 0


def test_patching_twice_changes_nothing() -> None:
    model = vision_model()
    assert integration.patch(model) == LAYERS
    first = [id(vars(m).get("forward")) for m in model.modules()]
    assert integration.patch(model) == LAYERS
    assert [id(vars(m).get("forward")) for m in model.modules()] == first
    assert integration.unpatch(model) == LAYERS


def test_context_manager_leaves_things_as_they_were() -> None:
    model = vision_model()
    first = model.vision_encoder.layers[0].attn
    integration.patch(first)
    with integration.patched(model) as number:
        assert number == LAYERS
        with integration.patched(model):
            pass
        assert integration.unpatch(copy.deepcopy(model)) == LAYERS
    assert [m for m in model.modules() if "forward" in vars(m)] == [first]
    with pytest.raises(KeyError), integration.patched(model):
        raise KeyError
    assert [m for m in model.modules() if "forward" in vars(m)] == [first]


def test_classes_parameters_and_hooks_stay() -> None:
    model = vision_model()
    layer = model.vision_encoder.layers[0].attn
    kind, state = type(layer), {k: v.data_ptr() for k, v in model.state_dict().items()}
    seen: list[torch.Size] = []
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
    )
    layer.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    integration.patch(model)
    model(pixels())
    assert type(layer) is kind
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    assert seen == [torch.Size([8, 3, 3, 32])] * 2


def test_attentions_are_those_of_stock() -> None:
    model = vision_model()
    stock = model(pixels(), output_attentions=True, output_hidden_states=True)
    with integration.patched(model):
        got = model(pixels(), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in got.attentions] == [a.shape for a in stock.attentions]
    assert len(got.hidden_states) == len(stock.hidden_states)
    exact = copy.deepcopy(model).double()(pixels().double(), output_attentions=True).attentions
    for layer, (g, s, e) in enumerate(zip(got.attentions, stock.attentions, exact, strict=True)):
        assert_close_as_eager(g.detach(), s.detach(), e.detach(), f"attentions[{layer}]")
    sdpa = vision_model("sdpa").vision_encoder.layers[0].attn
    integration.patch(sdpa)
    assert sdpa(torch.randn(1, 3, 3, 32))[1] is None


def test_dropout_is_that_of_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, bool]] = []

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        drawn.append((p, training))
        keep = torch.rand(x.numel(), generator=torch.Generator().manual_seed(len(drawn))) >= p
        return x * keep.view(x.shape) / (1 - p)

    def features(model: nn.Module) -> Tensor:
        drawn.clear()  # so that every run draws the same masks
        out = model(pixels().to(model.dtype)).last_hidden_state.detach()
        assert drawn == [(0.5, True)] * LAYERS
        return out

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    model = vision_model(attention_dropout=0.5).train()
    exact, rival = features(copy.deepcopy(model).double()), features(model)
    integration.patch(model)
    assert_close_as_eager(features(model), rival, exact, "output with dropout")


def test_autocast_and_checkpointing() -> None:
    model = vision_model().train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    exact = run(copy.deepcopy(model).double(), pixels().double())
    with torch.autocast("cpu", torch.bfloat16):
        rival = run(model, pixels())
        integration.patch(model)
        got = run(model, pixels())
    for name in exact:
        assert got[name].dtype == rival[name].dtype
        rounded = [t.bfloat16() for t in (got[name], rival[name])]  # one rounding is one of bfloat16
        assert_close_as_eager(*rounded, exact[name], name)


def test_saved_and_copied_models() -> None:
    model = vision_model()
    integration.patch(model)
    twin = copy.deepcopy(model)
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in vars(m))
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)  # with the library's forward
    integration.unpatch(model)
    expected = model(pixels()).last_hidden_state
    assert torch.equal(loaded(pixels()).last_hidden_state, expected)
    assert integration.patch(loaded) == LAYERS
    assert integration.unpatch(twin) == LAYERS


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must contain SamVisionAttention.* got Linear without"):
        integration.patch(nn.Linear(2, 2))
    model = vision_model()
    wrapped = model.vision_encoder.layers[1].attn
    wrapped.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"forward of vision_encoder\.layers\.1\.attn must be that"):
        integration.patch(model)
    assert not any("forward" in vars(m) for m in model.modules() if m is not wrapped)


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class Own(modeling_sam.SamVisionAttention):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return hidden_states, None

    with pytest.raises(ValueError, match="got Own without any"):
        integration.patch(Own(SamVisionConfig(**CONFIG), 3))
