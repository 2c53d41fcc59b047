"""The Triton norms, rotary positions and SiLU at odd sizes and on rounding, beside `test_layer_operations.py`."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.norm import apply_rotary, rms_norm, rms_norm_gated, silu_and_mul
from tests.kernels.packing import assert_near
from tests.kernels.test_norm import EPS, data

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _rubbish_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` returns is NaN until it is written."""
    new_empty = torch.Tensor.new_empty

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("shape", [(5, 63), (0, 8), (70, 3, 65), (2, 2, 2, 4), (9,)], ids=str)
def test_rms_norm(shape: tuple[int, ...], zero_centered: bool) -> None:
    x, weight = data(*shape, dtype=BF16) * 0.1, data(shape[-1], dtype=BF16, seed=1)
    out = rms_norm(x, weight, EPS, zero_centered, implementation="triton")
    assert out.dtype == BF16
    assert_near(out, rms_norm(x.double(), weight.double(), EPS, zero_centered))


def test_rms_norm_rounds_once() -> None:
    x, weight = data(18, 32, dtype=BF16), data(32, dtype=BF16, seed=1)
    out = rms_norm(x, weight, EPS, True, implementation="triton")
    in_float32 = rms_norm(x.float(), weight.float(), EPS, True, implementation="triton")
    assert torch.equal(out, in_float32.bfloat16())


def test_rms_norm_gated_of_an_odd_size_from_an_odd_place() -> None:
    x, weight = data(70, 3, 33, dtype=BF16) * 0.1, data(33, dtype=BF16, seed=2)
    gate = (data(70, 120, dtype=BF16, seed=1) * 3)[:, 21:].unflatten(1, (3, 33))
    out = rms_norm_gated(x, gate, weight, EPS, implementation="triton")
    assert out.dtype == BF16
    assert_near(out, rms_norm_gated(x.double(), gate.double(), weight.double(), EPS))


def test_rms_norm_gated_rounds_where_the_reference_does() -> None:
    x, gate = data(64, 32, dtype=BF16), data(64, 32, dtype=BF16, seed=1)
    weight = data(32, dtype=BF16, seed=2)
    out = rms_norm_gated(x, gate, weight, EPS, implementation="triton")
    different = (out != rms_norm_gated(x, gate, weight, EPS)).float().mean()
    # Another order of the sum tips a rounding now and then; leaving one out changes a third of the values.
    assert different < 0.01


@pytest.mark.parametrize("rotary_dim", [2, 6, 10])
def test_apply_rotary_and_the_rest_as_it_is(rotary_dim: int) -> None:
    q = data(5, 80, dtype=BF16)[:, 7:77].unflatten(1, (7, 10))
    k = data(5, 1, 10, dtype=BF16, seed=1)
    angles = data(5, rotary_dim // 2, dtype=torch.float64, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    turned = apply_rotary(q, k, cos, sin, implementation="triton")
    wanted = apply_rotary(q.double(), k.double(), cos.double(), sin.double())
    for x, out, good in zip((q, k), turned, wanted, strict=True):
        assert out.dtype == BF16
        assert_near(out, good)
        assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])


def test_apply_rotary_of_no_tokens() -> None:
    q, k = apply_rotary(
        torch.empty(0, 4, 8),
        torch.empty(0, 1, 8),
        torch.empty(0, 4),
        torch.empty(0, 4),
        implementation="triton",
    )
    assert q.shape == (0, 4, 8)
    assert k.shape == (0, 1, 8)


@pytest.mark.parametrize("shape", [(5, 2 * 63), (0, 8), (3, 2, 2 * 600)], ids=str)
def test_silu_and_mul(shape: tuple[int, ...]) -> None:
    gate_up = data(*shape, dtype=BF16) * 3
    out = silu_and_mul(gate_up, implementation="triton")
    assert out.dtype == BF16
    assert_near(out, silu_and_mul(gate_up.double()))
    assert_near(silu_and_mul(gate_up[1:], implementation="triton"), silu_and_mul(gate_up.double())[1:])
