"""Norms and rotary positions against their formulas in float64, and the rounding order of the gated norm."""

from __future__ import annotations

import math

import pytest
import torch

from moe_kernels.norm import apply_rotary, rms_norm, rms_norm_gated
from tests.kernels.implementations import every_implementation
from tests.kernels.packing import TOLERANCE, assert_near

implementation = every_implementation(apply_rotary, rms_norm, rms_norm_gated)

EPS = 1e-3  # large enough to show


def data(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("shape", [(5, 63), (0, 8), (3, 2, 65)], ids=str)
def test_rms_norm(shape: tuple[int, ...], zero_centered: bool, dtype: torch.dtype) -> None:
    x, weight = data(*shape, dtype=dtype) * 0.1, data(shape[-1], dtype=dtype, seed=1)
    out = rms_norm(x, weight, EPS, zero_centered)
    mean_square = x.double().pow(2).sum(-1, keepdim=True) / shape[-1]
    wanted = x.double() / (mean_square + EPS).sqrt() * (weight.double() + (1 if zero_centered else 0))
    assert out.dtype == dtype
    assert_near(out, wanted)


def test_rms_norm_rounds_once() -> None:
    x, weight = data(64, 32, dtype=torch.bfloat16), data(32, dtype=torch.bfloat16, seed=1)
    in_float32 = rms_norm(x.float(), weight.float(), EPS, True)
    assert torch.equal(rms_norm(x, weight, EPS, True), in_float32.bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm_gated(dtype: torch.dtype) -> None:
    x, gate = data(7, 3, 33, dtype=dtype) * 0.1, data(7, 3, 33, dtype=dtype, seed=1) * 3
    weight = data(33, dtype=dtype, seed=2)
    out = rms_norm_gated(x, gate, weight, EPS)
    x64, gate64 = x.double(), gate.double()
    normed = x64 / (x64.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert out.dtype == dtype
    assert_near(out, normed * gate64 / (1 + (-gate64).exp()))


def test_rms_norm_gated_rounds_as_transformers_does() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    theirs = Qwen3NextRMSNormGated(32, eps=EPS).bfloat16()
    with torch.no_grad():
        theirs.weight.copy_(data(32, dtype=torch.bfloat16, seed=2))
        x, gate = data(64, 32, dtype=torch.bfloat16), data(64, 32, dtype=torch.bfloat16, seed=1)
        assert torch.equal(rms_norm_gated(x, gate, theirs.weight, EPS), theirs(x, gate))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary_dim", [2, 6, 10])
def test_apply_rotary_turns_pairs(rotary_dim: int, dtype: torch.dtype) -> None:
    q, k = data(5, 3, 10, dtype=dtype), data(5, 1, 10, dtype=dtype, seed=1)
    half = rotary_dim // 2
    angles = data(5, half, dtype=torch.float64, seed=2).repeat(1, 2)
    turned = apply_rotary(q, k, angles.cos().to(dtype), angles.sin().to(dtype))
    for x, out in zip((q, k), turned, strict=True):
        wanted = x.double().clone()
        for t in range(5):
            for i in range(half):
                c, s = math.cos(angles[t, i]), math.sin(angles[t, i])
                a, b = x[t, :, i].double(), x[t, :, i + half].double()
                wanted[t, :, i], wanted[t, :, i + half] = a * c - b * s, b * c + a * s
        assert_near(out, wanted)
        assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])
