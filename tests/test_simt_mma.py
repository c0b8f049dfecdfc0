"""How the shim multiplies and adds: exactly, or as published of the tensor cores of a GPU (SIMT_MMA)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simt import toolchain
from test_simt import SELFTEST, Shim

HALVES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toolchain.compile_library([SELFTEST], tmp_path_factory.mktemp("simt") / "selftest.so", ["-O1", "-g0"])


@pytest.fixture
def shim(library: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
    return Shim(library, monkeypatch)


def matmul(shim: Shim, a: Tensor, b: Tensor, d: Tensor, through_ldmatrix: int = 0) -> Tensor:
    name = f"matmul {str(a.dtype).removeprefix('torch.')}"
    return shim(name, torch.cat([a.flatten(), b.flatten()]), d.clone(), through_ldmatrix)


@pytest.mark.parametrize("through_ldmatrix", [0, 1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_is_a_matrix_product(shim: Shim, dtype: torch.dtype, through_ldmatrix: int):
    torch.manual_seed(0)
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    shim.monkeypatch.setenv("SIMT_MMA", "exact")
    got = matmul(shim, a, b, d, through_ldmatrix)
    assert torch.equal(got, (a.double() @ b.double() + d.double()).float())
    assert shim.count("mma") == 1 and shim.count("ldmatrix") == 2 * through_ldmatrix


def cut(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """So many bits below 2**exponent remain."""
    return torch.ldexp(torch.ldexp(x, bits - exponent).trunc(), exponent - bits)


def added_by_tensor_cores(a: Tensor, b: Tensor, d: Tensor, at_once: int, bits: int) -> Tensor:
    def exponents(x: Tensor, least: int) -> Tensor:
        return torch.where(x == 0, -10000, (torch.frexp(x)[1] - 1).clamp(min=least))

    least = int(math.log2(torch.finfo(a.dtype).tiny))
    a, b, d = a.double(), b.double(), d.double()
    for k in range(0, 16, at_once):
        some = slice(k, k + at_once)
        summands = torch.cat([a[:, some, None] * b[None, some], d[:, None]], 1)
        of_products = exponents(a[:, some, None], least) + exponents(b[None, some], least)
        of_sum = exponents(d[:, None], -126)
        largest = torch.cat([of_products, of_sum], 1).amax(1, keepdim=True).clamp(min=-126)
        d = cut(summands, largest, bits).sum(1)
        d = cut(d, torch.frexp(d)[1] - 1, 23)
    return d.float()


@pytest.mark.parametrize(("gpu", "at_once", "bits"), [("sm80", 8, 24), ("sm90", 16, 25)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_cuts_off_as_tensor_cores_do(shim: Shim, dtype: torch.dtype, gpu: str, at_once: int, bits: int):
    torch.manual_seed(0)
    shim.monkeypatch.setenv("SIMT_MMA", gpu)
    for spread in (0, 4, 12, 30):  # of the exponents
        a, b, d = (torch.randn(*s) * 2 ** (torch.rand(*s) * -spread) for s in ((16, 16), (16, 8), (16, 8)))
        a, b = a.to(dtype), b.to(dtype)
        got = matmul(shim, a, b, d)
        assert torch.equal(got, added_by_tensor_cores(a, b, d, at_once, bits))
        assert not torch.equal(got, (a.double() @ b.double() + d.double()).float())


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_cut_off(shim: Shim, sign: int):
    """One and 16 products, by hand: each too small, or large enough; and less than two roundings of the sum."""
    for gpu, product, products, want in [
        ("exact", 2.0**-25, 16, 1 + 2.0**-21),
        ("sm80", 2.0**-25, 16, 1),
        ("sm80", 2.0**-24, 16, 1 + 2.0**-20),
        ("sm90", 2.0**-26, 16, 1),
        ("sm90", 2.0**-25, 16, 1 + 2.0**-21),
        ("exact", 1.75 * 2.0**-23, 1, 1 + 2.0**-22),
        ("sm80", 1.75 * 2.0**-23, 1, 1 + 2.0**-23),
        ("sm90", 1.75 * 2.0**-23, 1, 1 + 2.0**-23),
    ]:
        shim.monkeypatch.setenv("SIMT_MMA", gpu)
        a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
        a[:, :products] = sign * product
        got = matmul(shim, a, b, torch.full((16, 8), float(sign)))
        assert (got == sign * want).all(), (gpu, product, products)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_takes_numbers_of_every_kind(shim: Shim, dtype: torch.dtype):
    a, b = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8, dtype=dtype)
    kind = torch.finfo(dtype)
    some = [0, -0.0, torch.inf, -torch.inf, torch.nan, kind.max, kind.min, kind.tiny, kind.tiny / 4, kind.tiny * 0.75]
    a[:10, 0], b[0] = torch.tensor(some, dtype=torch.float64).to(dtype), 1
    got = shim(f"matmul {str(dtype).removeprefix('torch.')}", torch.cat([a.flatten(), b.flatten()]), torch.zeros(16, 8))
    torch.testing.assert_close(got, a[:, :1].float().expand(16, 8), rtol=0, atol=0, equal_nan=True)
