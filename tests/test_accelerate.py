"""accelerate and restore: what they change and what they leave, on a model of transformers and on made-up ones."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import relpos_cuda
from relpos_cuda.integrations import adapters
from stock import count_calls, run

pytest.importorskip("transformers")

from test_transformers import images, sam

LAYERS = 2


def test_a_report_prints_as_a_table():
    model = nn.ModuleList([sam(), sam("eager")])
    wrapped = model[1].vision_encoder.layers[0].attn
    wrapped.forward = lambda *args, **kwargs: None
    model.append(nn.Module())
    model[2].rel_pos_h = nn.Parameter(torch.zeros(3, 4))
    report = relpos_cuda.accelerate(model)
    assert len(report.found) == 2 * LAYERS + 1 and len(report.replaced) == 2 * LAYERS - 1
    assert [(f.name, f.reason) for f in report.skipped] == [
        ("1.vision_encoder.layers.0.attn", "something else has replaced its forward"),
        ("2", "its class is not known"),
    ]
    assert str(report).splitlines() == [
        "library       class                   modules  forward",
        "transformers  SamVisionSdpaAttention  2        fused",
        "transformers  SamVisionAttention      1        something else has replaced its forward",
        "transformers  SamVisionAttention      1        fused",
        "?             Module                  1        its class is not known",
    ]
    assert wrapped.forward() is None
    assert "no attention" in str(relpos_cuda.accelerate(nn.Linear(2, 2)))


def test_twice_is_once():
    model = sam()
    first = relpos_cuda.accelerate(model)
    forwards = [id(vars(m).get("forward")) for m in model.modules()]
    assert relpos_cuda.accelerate(model) == first and len(first.replaced) == LAYERS
    assert [id(vars(m).get("forward")) for m in model.modules()] == forwards
    assert relpos_cuda.restore(model) == LAYERS and relpos_cuda.restore(model) == 0
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("function", [relpos_cuda.accelerate, relpos_cuda.restore])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        function(lambda x: x)


def test_classes_parameters_and_hooks_stay():
    model = sam()
    layer = model.vision_encoder.layers[0].attn
    kind, state = type(layer), {k: v.data_ptr() for k, v in model.state_dict().items()}
    seen: list[torch.Size] = []
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
    )
    layer.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    relpos_cuda.accelerate(model)
    model(images(40, 40))
    assert type(layer) is kind
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    assert seen == [torch.Size([8, 3, 3, 32])] * 2


def test_before_and_after_to_and_half():
    x, model = images(40, 40), sam()
    relpos_cuda.accelerate(model)
    before = model.to(torch.bfloat16)(x.bfloat16()).last_hidden_state
    other = sam().to(torch.bfloat16)
    relpos_cuda.accelerate(other)
    assert torch.equal(other(x.bfloat16()).last_hidden_state, before)


@pytest.mark.slow
def test_before_and_after_compile():
    """A model that was compiled, and run, before: its code is made anew."""
    x, model = images(40, 40), sam()
    eager = model(x).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with count_calls() as calls, torch.no_grad():
        assert len(relpos_cuda.accelerate(compiled).replaced) == LAYERS
        got = compiled(x).last_hidden_state
    assert calls == [LAYERS], "traced again, with our forward"
    torch.testing.assert_close(got, eager)
    relpos_cuda.restore(compiled)
    torch.testing.assert_close(compiled(x).last_hidden_state, eager, rtol=0, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph():
    x, model = images(40, 40).cuda().half(), sam().cuda().half()
    relpos_cuda.accelerate(model)
    with torch.no_grad():
        eager = model(x).last_hidden_state.clone()  # libraries, indices on the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x).last_hidden_state
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, eager)


def test_saved_and_copied_models():
    model = sam()
    relpos_cuda.accelerate(model)
    twin = copy.deepcopy(model)
    assert all(m.forward.module is m for m in twin.modules() if "forward" in vars(m))
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)  # with the library's forward
    relpos_cuda.restore(model)
    expected = model(images(40, 40)).last_hidden_state
    assert torch.equal(loaded(images(40, 40)).last_hidden_state, expected)
    assert len(relpos_cuda.accelerate(loaded).replaced) == LAYERS
    assert relpos_cuda.restore(twin) == LAYERS
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert relpos_cuda.restore(loaded) == 0 and not any("forward" in vars(m) for m in loaded.modules())


def test_a_deleted_model_leaves_nothing():
    """At once: parameters that wait for Python's collector are memory of a GPU that nobody can use."""
    model = sam()
    relpos_cuda.accelerate(model)
    model(images(40, 40))
    forward = model.vision_encoder.layers[0].attn.forward
    assert list(inspect.signature(forward).parameters)[0] == "hidden_states"
    parameters = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not [p for p in parameters if p() is not None]
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="gone"):
        copy.deepcopy(forward)


def test_a_subclass_with_its_own_forward_is_left_alone():
    attention = type(sam().vision_encoder.layers[0].attn)

    class Own(attention):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return hidden_states, None

    class Inherits(attention):
        pass

    from transformers import SamVisionConfig

    config = SamVisionConfig(hidden_size=32, num_attention_heads=2)
    report = relpos_cuda.accelerate(nn.ModuleList([Own(config, 3), Inherits(config, 3)]))
    assert [f.reason for f in report.found] == ["its class is not known", ""]


def test_an_adapter_names_no_class_twice():
    names = [name for adapter in adapters.adapters() for name in adapter.classes]
    assert len(names) == len(set(names))


# ---- wrappers of distributed training, with one process


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap_first", [False, True])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.usefixtures("one_process")
def test_wrapped_models(wrapper: str, wrap_first: bool):
    from torch.distributed.fsdp import fully_shard

    def wrap(model: nn.Module) -> nn.Module:
        if wrapper == "ddp":
            return DistributedDataParallel(model)
        for layer in model.vision_encoder.layers:
            fully_shard(layer.attn)
            fully_shard(layer)
        return fully_shard(model)

    expected = run(sam(), images(40, 40))
    model = sam()
    if not wrap_first:
        assert len(relpos_cuda.accelerate(model).replaced) == LAYERS
    model = wrap(model)
    if wrap_first:
        assert len(relpos_cuda.accelerate(model).replaced) == LAYERS
    with count_calls() as calls:
        got = run(model, images(40, 40))
    assert calls == [LAYERS]
    for name, value in got.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value.cpu(), expected[name.replace("module.", "")], rtol=1e-4, atol=1e-5)
    assert relpos_cuda.restore(model) == LAYERS
