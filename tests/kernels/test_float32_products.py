"""The products of CPUs without compiled kernels, in torch's float32, against float64: a result is rounded once."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.linear import linear
from moe_kernels.quant import dequantize, quantize_fp8, quantize_int8
from tests.kernels.packing import random

DTYPES = [torch.bfloat16, torch.float16]
KINDS = ["as it is", "int8", "float8"]
EXPERTS, TOP_K, TOKENS = 5, 3, 33


def weight(
    *shape: int, kind: str, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A weight as it is kept, its scale, and in float64 the values that both stand for."""
    values = random(*shape, seed=seed) * shape[-1] ** -0.5
    if kind == "as it is":
        return values.to(dtype), None, values.to(dtype).double()
    codes, scale = quantize_int8(values) if kind == "int8" else quantize_fp8(values)
    return codes, scale, dequantize(codes, scale, torch.float64)


def assert_rounded_once(got: torch.Tensor, wanted_f64: torch.Tensor) -> None:
    """Each value is within half a unit in its last place, beside what float32 loses in a long sum.

    Computed in `got`'s dtype, weights or the experts' hidden rows would be rounded as well.
    """
    assert got.shape == wanted_f64.shape
    error = (got.double() - wanted_f64).abs()
    of_float32 = 1e-6 * wanted_f64.abs().max()
    allowed = wanted_f64.abs() * torch.finfo(got.dtype).eps / 2 + of_float32
    assert (error <= allowed).all(), f"up to {(error / allowed).max():.1f} times what one rounding makes"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, dtype: torch.dtype) -> None:
    x = random(2, TOKENS, 160, seed=1).to(dtype)
    w, scale, values = weight(72, 160, kind=kind, dtype=dtype, seed=2)
    y = linear(x, w, scale, implementation="float32")
    assert y.dtype == dtype
    assert_rounded_once(y, x.double() @ values.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind: str, dtype: torch.dtype) -> None:
    x = random(TOKENS, 160, seed=1).to(dtype)
    gate_up, gate_up_scale, gate_up_values = weight(EXPERTS, 96, 160, kind=kind, dtype=dtype, seed=2)
    down, down_scale, down_values = weight(EXPERTS, 160, 48, kind=kind, dtype=dtype, seed=3)
    ids = random(TOKENS, EXPERTS, seed=4).topk(TOP_K).indices
    ids[ids == 3] = -1  # lives elsewhere, and its weight means nothing
    scale = random(TOKENS, TOP_K, seed=5).sigmoid().to(dtype).masked_fill(ids < 0, torch.nan)
    y = fused_experts(x, ids, scale, gate_up, down, gate_up_scale, down_scale, implementation="float32")
    wanted = fused_experts(x.double(), ids, scale.double(), gate_up_values, down_values)
    assert y.dtype == dtype
    assert_rounded_once(y, wanted)
