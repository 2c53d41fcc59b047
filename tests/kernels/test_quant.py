"""Quantised weights: the two formats, counted by hand, and the products with them on every implementation."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.linear import linear
from moe_kernels.quant import dequantize, quantize_fp8, quantize_int8, scale_shape
from tests.kernels.implementations import IMPLEMENTATIONS
from tests.kernels.packing import assert_near

FORMATS = {torch.int8: quantize_int8, torch.float8_e4m3fn: quantize_fp8}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, so that a wrong row's scale shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(*shape[:-1], 1, generator=generator) * 4 + 0.1
    return torch.randn(shape, generator=generator) * sizes * shape[-1] ** -0.5


@pytest.mark.parametrize("shape", [(3, 5), (130, 257), (2, 3, 4), (0, 7), (1, 0, 128)], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_codes_and_scales_have_the_stated_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    codes, scale = FORMATS[dtype](torch.ones(shape))
    assert (codes.dtype, codes.shape, scale.dtype) == (dtype, shape, torch.float32)
    assert tuple(scale.shape) == scale_shape(shape, dtype)


def test_scale_shapes() -> None:
    assert scale_shape((6, 130, 257), torch.int8) == (6, 130)
    assert scale_shape((6, 130, 257), torch.float8_e4m3fn) == (6, 2, 3)
    with pytest.raises(ValueError, match=r"a scaled weight is torch\.bfloat16; wanted torch\.int8 or"):
        scale_shape((2, 2), torch.bfloat16)


def test_int8_rounds_each_row_to_127_steps() -> None:
    codes, scale = quantize_int8(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.03]]))
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 50, 2]]
    assert torch.allclose(scale, torch.tensor([0.01, 0.0, 0.02]))


def test_fp8_has_a_factor_for_each_block() -> None:
    weight = torch.zeros(129, 130)
    weight[3, 5], weight[0, 129], weight[128, 0] = 448.0, -4.48, 0.896
    codes, scale = quantize_fp8(weight)
    assert torch.allclose(scale, torch.tensor([[1.0, 0.01], [0.002, 0.0]]))
    assert [codes[place].item() for place in ((3, 5), (0, 129), (128, 0), (128, 129))] == [448, -448, 448, 0]
    assert torch.allclose(dequantize(codes, scale, torch.float32), weight)


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2**-4)], ids=str)
def test_values_come_back_within_half_a_step(dtype: torch.dtype, error: float) -> None:
    weight = random(3, 130, 257)
    back = dequantize(*FORMATS[dtype](weight), torch.float32)
    # int8: of the row's largest. float8 has 3 bits after the first: of the value itself.
    largest = weight.abs().amax(-1, keepdim=True) if dtype == torch.int8 else weight.abs().clamp_min(2e-3)
    assert ((back - weight).abs() <= largest * error * 1.001).all()


@pytest.mark.parametrize("tokens", [0, 1, 5, 66])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept_in", FORMATS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_linear_multiplies_with_the_values(
    implementation: str, kept_in: torch.dtype, dtype: torch.dtype, tokens: int
) -> None:
    codes, scale = FORMATS[kept_in](random(131, 259))
    x = torch.randn(tokens, 259, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = x.double() @ dequantize(codes, scale, torch.float64).T
    y = linear(x, codes, scale, implementation=implementation)
    assert y.dtype == dtype
    assert_near(y, wanted)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept_in", FORMATS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_multiply_with_the_values(
    implementation: str, kept_in: torch.dtype, dtype: torch.dtype, tokens: int
) -> None:
    experts, hidden, inner, top_k = 5, 131, 37, 2
    gate_up, gate_up_scale = FORMATS[kept_in](random(experts, 2 * inner, hidden, seed=2))
    down, down_scale = FORMATS[kept_in](random(experts, hidden, inner, seed=3))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    # Expert 3 is chosen by nobody, and -1 is an expert of elsewhere.
    ids = torch.stack(
        [torch.tensor([0, 1, 2, 4, -1])[torch.randperm(5, generator=generator)[:top_k]] for _ in x]
    )
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype)
    exact = [dequantize(gate_up, gate_up_scale, torch.float64), dequantize(down, down_scale, torch.float64)]
    wanted = fused_experts(x.double(), ids, weights.double(), *exact, implementation="reference")
    y = fused_experts(
        x, ids, weights, gate_up, down, gate_up_scale, down_scale, implementation=implementation
    )
    assert_near(y, wanted)
