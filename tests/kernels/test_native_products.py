"""The native products against float64: every instruction set, type and shape of tile; rows do not see each other."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.linear import linear
from moe_kernels.quant import dequantize, quantize_int8
from tests.kernels.implementations import INTERPRETED, NATIVE, on_threads
from tests.kernels.packing import assert_near, random

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the native kernels are not Triton's")
KINDS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float32),
]
EXPERTS, TOP_K = 5, 3

threads = on_threads(1, 2)


def weight(
    *shape: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A weight as it is kept, its scale, and the values that both stand for."""
    values = random(*shape, seed=seed) * shape[-1] ** -0.5
    if dtype != torch.int8:
        return values.to(dtype), None, values.to(dtype).double()
    codes, scale = quantize_int8(values)
    return codes, scale, dequantize(codes, scale, torch.float64)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize(
    ("rows", "features", "depth"),
    # Whole tiles of every kind and what is left over of each: rows in twos of 16, features in 32, depth in 32 and 128.
    [
        (1, 32, 64),
        (1, 7, 3),
        (5, 48, 160),
        (16, 64, 2080),
        (17, 33, 100),
        (53, 96, 257),
        (24, 20, 4132),
        (300, 40, 96),
    ],
)
def test_linear(
    rows: int, features: int, depth: int, level: str, x_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    x = random(rows, depth, seed=1).to(x_dtype)
    w, scale, values = weight(features, depth, dtype=w_dtype, seed=2)
    y = linear(x, w, scale, implementation=level)
    assert y.dtype == x_dtype
    assert_near(y, x.double() @ values.T)
    some = slice(rows // 2, rows // 2 + 1)
    assert torch.equal(y[some], linear(x[some], w, scale, implementation=level))


def by_expert(
    x: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    x, y = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for expert in range(gate_up.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        y.index_add_(
            0, token, scale.double()[token, choice, None] * (gate.sigmoid() * gate * up @ down[expert].T)
        )
    return y


@pytest.mark.parametrize(("x_dtype", "w_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner"), [(1, 64, 32), (3, 100, 16), (40, 160, 48), (70, 33, 20), (1100, 32, 32)]
)
def test_experts(
    tokens: int, hidden: int, inner: int, level: str, x_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    x = random(tokens, hidden, seed=1).to(x_dtype)
    gate_up, gate_up_scale, gate_up_values = weight(EXPERTS, 2 * inner, hidden, dtype=w_dtype, seed=2)
    down, down_scale, down_values = weight(EXPERTS, hidden, inner, dtype=w_dtype, seed=3)
    ids = random(tokens, EXPERTS, seed=4).topk(TOP_K).indices
    ids[ids == 3] = -1  # lives elsewhere
    scale = random(tokens, TOP_K, seed=5).sigmoid().to(x_dtype)

    def computed(part: slice) -> torch.Tensor:
        return fused_experts(
            x[part], ids[part], scale[part], gate_up, down, gate_up_scale, down_scale, implementation=level
        )

    y = computed(slice(None))
    assert_near(y, by_expert(x, ids, scale, gate_up_values, down_values))
    some = slice(tokens // 2, tokens // 2 + 1)
    assert torch.equal(y[some], computed(some))
