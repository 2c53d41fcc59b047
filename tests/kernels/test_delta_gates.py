"""delta_gates value by value against the formulas in float64: where softplus is about e^x, about x, or no number."""

from __future__ import annotations

import math

import pytest
import torch

from moe_kernels.gated_delta import delta_gates
from tests.kernels.implementations import IMPLEMENTATIONS

DTYPES = [torch.float32, torch.bfloat16]
# Triton's own exponentials are as accurate as the device's.
EXACT = [name for name in IMPLEMENTATIONS if name != "triton"]
pytestmark = pytest.mark.skipif(not EXACT, reason="this run is for Triton alone")

# Five halves of a unit in float32's last place.
TOLERANCE = 5 * 2**-24
# The native exponential stops falling at about the least normal number.
LEAST = 1.3e-38


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative error of values above LEAST."""
    return ((got.double() - wanted).abs() / wanted.abs().clamp(min=LEAST / TOLERANCE)).max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", EXACT)
def test_values_from_minus_100_to_100(implementation: str, dtype: torch.dtype) -> None:
    x_T1 = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-2, 2, 4001)])[:, None].to(dtype)
    decay, beta = delta_gates(x_T1, x_T1, torch.zeros(1), torch.zeros(1), implementation=implementation)
    assert error(decay, -torch.nn.functional.softplus(x_T1.double())) <= TOLERANCE
    wanted = x_T1.double().sigmoid()
    assert error(beta, wanted) <= (TOLERANCE if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("implementation", EXACT)
def test_no_term_is_missing_where_a_series_would_need_most(implementation: str) -> None:
    x_T1 = torch.linspace(-0.1, 0.1, 2001)[:, None]
    decay, _ = delta_gates(x_T1, x_T1, torch.zeros(1), torch.zeros(1), implementation=implementation)
    wanted = -torch.nn.functional.softplus(x_T1.double())
    # Roundings cancel out, a term does not: without the last of the native series this is 1.7 * 2^-24.
    assert ((decay.double() - wanted) / wanted).mean().abs() <= 0.5 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_heads", [1, 3, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("implementation", EXACT)
def test_each_head_has_its_own_rate_and_bias(implementation: str, num_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_heads)
    b, a = (torch.randn(5, 2 * num_heads, generator=generator) * 8).to(dtype).chunk(2, dim=-1)
    a_log, dt_bias = torch.randn(2, num_heads, generator=generator) * 3
    decay, beta = delta_gates(a, b, a_log, dt_bias, implementation=implementation)
    # The sum is rounded to float32 as it is in every implementation: where softplus is e^x, that shows.
    softplus = torch.nn.functional.softplus((a.float() + dt_bias).double())
    assert error(decay, -a_log.double().exp() * softplus) <= 2 * TOLERANCE
    assert error(beta, b.double().sigmoid()) <= (TOLERANCE if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", EXACT)
def test_what_is_no_number_stays_none_and_infinities_are_limits(
    implementation: str, dtype: torch.dtype
) -> None:
    x = torch.tensor([[math.nan, 0.0, math.inf, -math.inf]], dtype=dtype)
    decay, beta = delta_gates(x, x, torch.zeros(4), torch.zeros(4), implementation=implementation)
    assert torch.stack([decay[0, 0], beta[0, 0]]).isnan().all()
    assert decay[0, 1:].tolist() == pytest.approx([-math.log(2), -math.inf, 0.0], abs=LEAST, rel=1e-6)
    assert beta[0, 1:].tolist() == pytest.approx([0.5, 1.0, 0.0], abs=LEAST)
