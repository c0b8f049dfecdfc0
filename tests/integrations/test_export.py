"""Accelerated models leave PyTorch: torch.export, AOTInductor, ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import relpos_cuda
from test_segment_anything import encoder
from test_timm import mvit


def images() -> torch.Tensor:
    return torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def accelerated() -> nn.Module:
    model = encoder("segment_anything").eval()
    assert len(relpos_cuda.accelerate(model).replaced) == 3
    return model


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool):
    model = accelerated()
    with torch.no_grad():
        exported = torch.export.export(model, (images(),), strict=strict)
    assert str(exported).count("relpos_cuda.attention_fwd") == 3
    torch.testing.assert_close(exported.module()(images()), model(images()))


def test_ahead_of_time_inductor(tmp_path):
    """What runs is C++ alone, with our library loaded into it."""
    model = accelerated()
    with torch.no_grad():
        exported = torch.export.export(model, (images(),))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "encoder.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(images()), model(images()))


def test_onnx_of_any_batch(tmp_path):
    """Sizes that the older exporter writes down as numbers are those that no call changes."""
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, file = mvit().eval(), str(tmp_path / "mvit.onnx")
    assert relpos_cuda.accelerate(model).replaced
    draw = torch.Generator().manual_seed(1)
    pixels, more = torch.randn(2, 3, 32, 32, generator=draw), torch.randn(3, 3, 32, 32, generator=draw)
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    with torch.no_grad():
        torch.onnx.export(model, (pixels,), file, dynamo=False, **names)
        (got,) = runtime.InferenceSession(file).run(None, {"x": more.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo: bool, tmp_path):
    """By the formula: standard operators, which any runtime knows."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = accelerated(), str(tmp_path / "encoder.onnx")
    with torch.no_grad():
        torch.onnx.export(model, (images(),), file, dynamo=dynamo)
    session = runtime.InferenceSession(file)
    (got,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(images()), rtol=1e-4, atol=1e-5)
