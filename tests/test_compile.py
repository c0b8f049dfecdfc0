"""What wraps the op: torch.compile, export, opcheck, autocast, checkpoint, functorch, fake and meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import relpos_cuda
from problems import Problem, call, draw, same
from relpos_cuda import _ops, support, tables

ours = relpos_cuda.add_decomposed_rel_pos
PROBLEMS = [
    same("square", 5, 6, 16, batch=2),
    Problem("video_cls_interpolated", (2, 4, 3), (2, 2, 3), 8, prefix=1, table=5),
]


def leaves_of(problem: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    return draw(problem, dtype).leaves(dtype, device)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_compile_fullgraph(problem: Problem, backend: str, inplace: bool, real_device: str):
    torch._dynamo.reset()

    def function(attn, q, *tables):
        return call(ours, problem, attn * 2, q, list(tables), inplace=inplace).sin()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    leaves, others = (leaves_of(problem, device=real_device) for _ in range(2))
    got, want = compiled(*leaves), function(*others)
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, others, grad))


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compile_many_shapes(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch):
    """Batch and grid change from call to call; support is asked as it is for a GPU."""
    monkeypatch.setattr(
        support, "fused", lambda q, *grids_and_prefix: not support._reason(q, *grids_and_prefix[:3], "logits", None)
    )
    torch._dynamo.reset()

    def function(image, q, rel_pos_h, rel_pos_w):
        batch, h, w = image.shape
        attn = image.new_ones(batch, 2, h * w, h * w)
        return ours(attn, q, rel_pos_h, rel_pos_w, (h, w), (h, w)).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, h, w in [(2, 5, 6), (3, 5, 6), (3, 4, 3)]:
        shapes = [(batch, h, w), (batch, 2, h * w, 16), (9, 16), (11, 16)]
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]  # interpolation is traced differently
        leaves = [t.requires_grad_() for t in inputs[1:]]
        got, want = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


class Module(torch.nn.Module):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        tables_ = draw(problem, torch.float32).tables
        self.tables = torch.nn.ParameterList([torch.nn.Parameter(t.float()) for t in tables_])

    def forward(self, attn, q):
        return call(ours, self.problem, attn, q, list(self.tables))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_export(problem: Problem, strict: bool):
    module = Module(problem)
    attn, q, *_ = (t.detach() for t in leaves_of(problem))
    exported = torch.export.export(module, (attn, q), strict=strict)
    torch.testing.assert_close(exported.module()(attn, q), module(attn, q))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("logits_fwd" in str(node.target) for graph in graphs for node in graph.nodes)


def test_tracing_leaves_no_fake_index_in_the_cache():
    problem = same("cache", 3, 11, 8)
    tables._device_lookup.cache_clear()
    attn, q, *_ = (t.detach() for t in leaves_of(problem))
    torch.export.export(Module(problem), (attn, q), strict=False)
    index = tables.lookup(problem.q_size, problem.k_size, torch.device("cpu"))
    assert type(index) is torch.Tensor


@pytest.mark.parametrize("in_place", [False, True])
def test_opcheck(in_place: bool, device: str):
    if device == "cuda":
        pytest.skip("needs CUDA work spaces; covered by the other tests")
    attn, q, h, w = (t.detach() for t in leaves_of(PROBLEMS[0]))
    grids = (PROBLEMS[0].q_size, PROBLEMS[0].k_size)
    table, index = tables.stack([h, w], *grids), tables.lookup(*grids, q.device)
    out, read = (attn.clone(), None) if in_place else (torch.empty_like(attn), attn)
    torch.library.opcheck(_ops.logits_fwd, (out, read, q, table, index, *grids, 0))
    factors, partials = torch.empty(q.shape[:-1].numel(), 11), torch.empty(3, 25 + 36, 16)
    gradients = (torch.empty_like(q), torch.empty_like(table))
    torch.library.opcheck(_ops.logits_bwd, (*gradients, attn, q, table, index, factors, partials, *grids, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_q_and_tables_and_keeps_attn(dtype: torch.dtype, real_device: str):
    problem = PROBLEMS[0]
    leaves = leaves_of(problem, device=real_device)
    attn, q, h, w = leaves
    with torch.autocast(real_device, dtype=dtype):
        half = ours(attn.to(dtype), q, h, w, problem.q_size, problem.k_size)
        full = ours(attn, q, h, w, problem.q_size, problem.k_size)
    assert half.dtype == dtype
    assert full.dtype == torch.float32
    rounded = [t.detach().to(dtype) for t in (q, h, w)]
    torch.testing.assert_close(full.detach(), ours(attn.detach(), *rounded, problem.q_size, problem.k_size))
    grads = torch.autograd.grad(full.sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 4


def test_autocast_leaves_float64_alone():
    problem = PROBLEMS[0]
    attn, q, h, w = leaves_of(problem, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(attn, q, h, w, problem.q_size, problem.k_size)
    assert torch.equal(out, ours(attn, q, h, w, problem.q_size, problem.k_size))


def test_float32_tables_of_half_queries_get_float32_gradients(device: str):
    problem = PROBLEMS[0]
    attn, q, h, w = leaves_of(problem, torch.float32, device)
    half = [attn.bfloat16(), q.bfloat16()]
    mixed = ours(*half, h, w, problem.q_size, problem.k_size)
    all_half = ours(*half, h.bfloat16(), w.bfloat16(), problem.q_size, problem.k_size)
    assert torch.equal(mixed, all_half)
    grads = torch.autograd.grad(mixed.float().square().sum(), (h, w))
    rounded = torch.autograd.grad(all_half.float().square().sum(), (h, w))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert all(torch.equal(g.bfloat16(), r.bfloat16()) for g, r in zip(grads, rounded, strict=True))


def test_checkpoint(device: str):
    problem = PROBLEMS[1]
    leaves = leaves_of(problem, device=device)

    def function(attn, q, *tables):
        return call(ours, problem, attn, q, list(tables))

    want = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(checkpoint(function, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_functorch_grad(device: str):
    problem = PROBLEMS[0]
    attn, q, h, w = leaves_of(problem, device=device)

    def loss(q):
        return ours(attn, q, h, w, problem.q_size, problem.k_size).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), torch.autograd.grad(loss(q), q)[0])


def test_in_place_on_a_view_under_autograd(device: str):
    problem = PROBLEMS[0]
    attn, q, h, w = leaves_of(problem, device=device)
    whole = attn * 1
    ours(whole[:1], q[:1], h, w, problem.q_size, problem.k_size, inplace=True)
    want = torch.cat([ours(attn[:1], q[:1], h, w, problem.q_size, problem.k_size), attn[1:]])
    assert torch.equal(whole, want)
    grad = torch.randn_like(want)
    leaves = (attn, q, h, w)
    torch.testing.assert_close(torch.autograd.grad(whole, leaves, grad), torch.autograd.grad(want, leaves, grad))


def test_meta_tensors():
    leaves = [t.detach().to("meta") for t in leaves_of(PROBLEMS[1])]
    out = call(ours, PROBLEMS[1], leaves[0], leaves[1], leaves[2:])
    assert out.is_meta and out.shape == leaves[0].shape


def test_inference_mode_first_then_training():
    problem = same("first", 2, 13, 8)
    attn, q, h, w = leaves_of(problem)
    tables._device_lookup.cache_clear()
    with torch.inference_mode():
        ours(attn, q, h, w, problem.q_size, problem.k_size)
    ours(attn, q, h, w, problem.q_size, problem.k_size).sum().backward()
    assert q.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph_capture():
    problem = PROBLEMS[0]
    attn, q, h, w = (t.detach() for t in leaves_of(problem, device="cuda"))
    want = ours(attn, q, h, w, problem.q_size, problem.k_size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(attn, q, h, w, problem.q_size, problem.k_size)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)
