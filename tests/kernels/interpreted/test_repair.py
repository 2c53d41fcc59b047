"""The mended interpreter: casts as torch's, products and sums near float64's."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _product(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _double(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_casts_round_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 8
    y = torch.empty(256, dtype=dtype)
    _cast[(1,)](x, y, SIZE=256)
    assert torch.equal(y.view(torch.uint8), x.to(dtype).view(torch.uint8))


def test_bfloat16_products_and_sums() -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(64, 64)
    _product[(1,)](a, b, c, SIZE=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    y = torch.empty(64, dtype=torch.bfloat16)
    _double[(1,)](a[0], y, SIZE=64)
    assert torch.equal(y, a[0] + a[0])
