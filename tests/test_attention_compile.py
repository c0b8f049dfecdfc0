"""What wraps rel_pos_attention: torch.compile, export, opcheck, autocast, checkpoint, functorch, meta tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import relpos_cuda
from problems import Problem, call_attention, draw_attention, same
from relpos_cuda import _ops, autograd, tables

ours = relpos_cuda.rel_pos_attention
PROBLEMS = [
    same("square", 5, 6, 16, batch=2),
    Problem("video_cls_interpolated", (2, 4, 3), (2, 2, 3), 8, prefix=1, table=5),
]


def leaves_of(problem: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    return draw_attention(problem, dtype).leaves(dtype, device)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_compile_fullgraph(problem: Problem, backend: str, real_device: str):
    torch._dynamo.reset()

    def function(q, *others):
        return call_attention(ours, problem, [q * 2, *others]).transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    leaves, others = (leaves_of(problem, device=real_device) for _ in range(2))
    got, want = compiled(*leaves), function(*others)
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, others, grad))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_takes_views_that_start_elsewhere(backend: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """Where a tensor starts is no part of what is traced: at run time the op copies what it cannot read by vectors."""
    torch._dynamo.reset()
    if device == "cpu":  # traces what is for a GPU
        monkeypatch.setattr(autograd, "_needs_work_spaces", lambda q: True)
    problem = PROBLEMS[0]
    compiled = torch.compile(lambda *leaves: call_attention(ours, problem, [*leaves]), fullgraph=True, backend=backend)
    for start in (0, 4, 1, 3):
        tensors = [t.detach() for t in leaves_of(problem, device=device)]
        leaves = [torch.cat([t.new_zeros(start), t.flatten()])[start:].view_as(t).requires_grad_() for t in tensors]
        got, want = compiled(*leaves), call_attention(ours, problem, leaves)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (got, want)]
        torch.testing.assert_close(*gradients)


class TwoGrids(torch.nn.Module):
    """As in every SAM: windows and whole images in one graph, each twice."""

    grids = ((3, 4), (4, 3), (3, 4), (4, 3))

    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ParameterList([torch.randn(7, 8) for _ in range(2)])

    def forward(self, x):
        tables = list(self.tables)  # PyTorch 2.11 traces no ParameterList that is unpacked beside other arguments
        for grid in self.grids:
            x = x + ours(x, x.sin(), x.cos(), *tables, grid, grid)
            x = x + relpos_cuda.add_decomposed_rel_pos(x @ x.mT, x, *tables, grid, grid) @ x
        return x


@pytest.mark.parametrize("others", [63, 255])
def test_grids_of_one_graph_met_long_apart(others: int, monkeypatch: pytest.MonkeyPatch):
    """As where a process has compiled for images of many sizes, and every time for one size of window."""
    torch._dynamo.reset()
    monkeypatch.setattr(relpos_cuda.tables, "_SLOTS", {})
    first, second = TwoGrids.grids[:2]
    for grid in (first, *((side, 1) for side in range(others)), second):
        relpos_cuda.tables._slot(grid, grid)
    module, x = TwoGrids(), torch.randn(2, 1, 12, 8) / 8
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("way", ["compile", "strict export", "export"])
def test_several_grids_in_one_graph(way: str):
    torch._dynamo.reset()
    module, x = TwoGrids(), torch.randn(2, 1, 12, 8) / 8
    if way == "compile":
        traced = torch.compile(module, fullgraph=True, backend="aot_eager")
    else:
        traced = torch.export.export(module, (x,), strict="strict" in way).module()
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compile_many_shapes(dynamic: bool | None):
    torch._dynamo.reset()

    def function(image, qkv, rel_pos_h, rel_pos_w):
        _, h, w = image.shape
        q, k, v = qkv.unbind()
        return ours(q, k, v, rel_pos_h, rel_pos_w, (h, w), (h, w), scale=q.shape[-1] ** -0.25).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, h, w in [(2, 5, 6), (3, 5, 6), (3, 4, 3)]:
        shapes = [(batch, h, w), (3, batch, 2, h * w, 16), (9, 16), (11, 16)]
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]  # interpolation is traced differently
        leaves = [t.requires_grad_() for t in inputs[1:]]
        got, want = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


class Module(torch.nn.Module):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        self.tables = torch.nn.ParameterList([torch.nn.Parameter(t) for t in leaves_of(problem)[3:]])

    def forward(self, q, k, v):
        return call_attention(ours, self.problem, [q, k, v, *list(self.tables)])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_export(problem: Problem, strict: bool):
    module = Module(problem)
    qkv = tuple(t.detach() for t in leaves_of(problem)[:3])
    exported = torch.export.export(module, qkv, strict=strict)
    torch.testing.assert_close(exported.module()(*qkv), module(*qkv))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("attention_fwd" in str(node.target) for graph in graphs for node in graph.nodes)


def test_layers_with_symbolic_scales():
    """What a second layer compares inside its Function would be a number of the outside."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(relpos_cuda.RelPosAttention(16, 2, (4, 4)) for _ in range(2)))
    compiled = torch.compile(layers, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 4, 16)
        got, want = compiled(x), layers(x)
        torch.testing.assert_close(got, want)
        parameters = list(layers.parameters())
        gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in (got, want)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_any_batch(strict: bool):
    """With parameters that could be trained, as every module has that nobody froze."""
    module, x = trained_module(), torch.randn(2, 6, 5, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict).module()
    for n in (1, 3):
        x = torch.randn(n, 6, 5, 32)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("op", ["attention", "logits"])
def test_torchscript_gets_the_formula(op: str, tmp_path: Path):
    """Traced, saved, loaded where nobody knows our ops."""
    if op == "attention":
        function, inputs = trained_module(), (torch.randn(2, 6, 5, 32),)
    else:
        inputs = tuple(torch.randn(shape) for shape in [(2, 12, 12), (2, 12, 8), (5, 8), (7, 8)])

        def function(*tensors: torch.Tensor) -> torch.Tensor:
            return relpos_cuda.add_decomposed_rel_pos(*tensors, (3, 4), (3, 4))

    file = str(tmp_path / "traced.pt")
    torch.jit.trace(function, inputs).save(file)
    loaded = torch.jit.load(file)
    assert "relpos_cuda::" not in str(loaded.inlined_graph)
    inputs = tuple(torch.randn_like(x) for x in inputs)
    torch.testing.assert_close(loaded(*inputs), function(*inputs))


def trained_module() -> relpos_cuda.RelPosAttention:
    module = relpos_cuda.RelPosAttention(32, 4, (6, 5))
    for table in (module.rel_pos_h, module.rel_pos_w):
        torch.nn.init.normal_(table)
    return module


@pytest.mark.parametrize("some", [False, True])
def test_opcheck(some: bool, real_device: str):
    """With all outputs, and with those only that may not be None."""
    q, k, v, h, w = (t.detach() for t in leaves_of(PROBLEMS[0], device=real_device))
    grids = (PROBLEMS[0].q_size, PROBLEMS[0].k_size)
    table, index = tables.stack([h, w], *grids), tables.lookup(*grids, q.device)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2].numel(), q.shape[2], device=real_device)
    problem = (table, index, *grids, 0, 0.25)
    torch.library.opcheck(_ops.attention_fwd, (out, None if some else lse, q, k, v, *problem))
    gradients = [None if some else torch.zeros_like(t) for t in (q, k, v, table)]
    work_spaces = (*autograd._work_spaces(q, *grids, not some), *autograd._factor_cache(q, *grids, 0, not some))
    arguments = (torch.ones_like(q), q, k, v, out, lse, *problem[:2], *work_spaces, *problem[2:])
    torch.library.opcheck(_ops.attention_bwd, (*gradients, *arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_as_scaled_dot_product_attention(dtype: torch.dtype, real_device: str):
    problem = PROBLEMS[0]
    leaves = leaves_of(problem, device=real_device)
    with torch.autocast(real_device, dtype=dtype):
        out = call_attention(ours, problem, leaves)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(*leaves[:3]).dtype == dtype
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    rounded = [t.detach().to(dtype).requires_grad_() for t in leaves]
    want = call_attention(ours, problem, rounded)
    assert torch.equal(out, want)
    assert [g.dtype for g in grads] == [torch.float32] * 5
    expected = torch.autograd.grad(want.float().square().sum(), rounded)
    assert all(torch.equal(g.to(dtype), e) for g, e in zip(grads, expected, strict=True))


def test_autocast_leaves_float64_alone():
    leaves = leaves_of(PROBLEMS[0], torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call_attention(ours, PROBLEMS[0], leaves)
    assert torch.equal(out, call_attention(ours, PROBLEMS[0], leaves))


def test_float32_tables_of_half_queries_get_float32_gradients(real_device: str):
    q, k, v, h, w = leaves_of(PROBLEMS[0], torch.float32, real_device)
    half = [t.bfloat16() for t in (q, k, v)]
    mixed = call_attention(ours, PROBLEMS[0], [*half, h, w])
    assert torch.equal(mixed, call_attention(ours, PROBLEMS[0], [*half, h.bfloat16(), w.bfloat16()]))
    grads = torch.autograd.grad(mixed.float().square().sum(), (h, w))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert not any(torch.equal(g, g.bfloat16().float()) for g in grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool, real_device: str):
    problem = PROBLEMS[1]
    leaves = leaves_of(problem, device=real_device)

    def function(*tensors):
        return call_attention(ours, problem, list(tensors))

    want = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    checkpoint(function, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, b) for leaf, b in zip(leaves, want, strict=True))


@pytest.mark.parametrize("argument", range(4))
def test_functorch_grad(argument: int, real_device: str):
    leaves = leaves_of(PROBLEMS[0], device=real_device)

    def loss(x):
        return call_attention(ours, PROBLEMS[0], [*leaves[:argument], x, *leaves[argument + 1 :]]).square().sum()

    want = torch.autograd.grad(loss(leaves[argument]), leaves[argument])[0]
    torch.testing.assert_close(torch.func.grad(loss)(leaves[argument].detach()), want)


def test_functorch_grad_of_what_an_inner_transform_lifted():
    """Inside the inner grad nothing requires a gradient by itself; the outer one still wants its own."""
    q, k, v, h, w = (t.detach() for t in leaves_of(PROBLEMS[0]))

    def outer(q):
        def inner(x):
            return (call_attention(ours, PROBLEMS[0], [q, k, v, h, w]).square().sum() * x).sum()

        return torch.func.grad(inner)(torch.ones(()))

    want = torch.func.grad(lambda q: call_attention(ours, PROBLEMS[0], [q, k, v, h, w]).square().sum())(q)
    torch.testing.assert_close(torch.func.grad(outer)(q), want)


def test_meta_tensors():
    leaves = [t.detach().to("meta").requires_grad_() for t in leaves_of(PROBLEMS[1])]
    out = call_attention(ours, PROBLEMS[1], leaves)
    assert out.is_meta and out.shape == leaves[0].shape
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in leaves)
