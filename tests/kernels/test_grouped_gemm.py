"""fused_experts against a loop over tokens and choices in float64."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.grouped_gemm import fused_experts
from tests.kernels.packing import TOLERANCE, assert_near

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 20, 12, 6, 3


def weights(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) * INTERMEDIATE**-0.5
    return gate_up.to(dtype), down.to(dtype)


def by_hand(
    x: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    x, scale, gate_up, down = (t.double() for t in (x, scale, gate_up, down))
    y = torch.zeros_like(x)
    for g in range(x.shape[0]):
        for k in range(ids.shape[1]):
            expert = int(ids[g, k])
            if expert >= 0:
                gate = gate_up[expert, :INTERMEDIATE] @ x[g]
                up = gate_up[expert, INTERMEDIATE:] @ x[g]
                y[g] += scale[g, k] * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
    return y


def choices(kind: str, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    if kind == "an empty expert":
        return torch.where(ids == 2, -1, ids)
    if kind == "one expert has everything":
        return torch.full((tokens, TOP_K), -1).index_fill_(1, torch.tensor([1]), 4)
    if kind == "all elsewhere":
        return torch.full((tokens, TOP_K), -1)
    return ids


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["spread", "an empty expert", "one expert has everything", "all elsewhere"])
@pytest.mark.parametrize("tokens", [1, 65])
def test_equals_the_sum_over_choices(kind: str, tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(2)).to(dtype)
    ids = choices(kind, tokens)
    # The weight of a choice that lives elsewhere means nothing.
    scale[ids < 0] = torch.nan
    gate_up, down = weights(dtype)
    y = fused_experts(x, ids, scale, gate_up, down)
    assert y.dtype == dtype
    assert_near(y, by_hand(x, ids, scale, gate_up, down))


@pytest.mark.parametrize("local", [0, EXPERTS])
def test_no_tokens(local: int) -> None:
    gate_up, down = weights(torch.float32)
    ids = torch.empty(0, TOP_K, dtype=torch.int64)
    y = fused_experts(torch.empty(0, HIDDEN), ids, torch.empty(0, TOP_K), gate_up[:local], down[:local])
    assert y.shape == (0, HIDDEN)


def test_a_rank_without_experts_adds_nothing() -> None:
    gate_up, down = weights(torch.float32)
    ids = torch.full((5, TOP_K), -1)
    y = fused_experts(torch.ones(5, HIDDEN), ids, torch.ones(5, TOP_K), gate_up[:0], down[:0])
    assert y.eq(0).all()


def test_the_order_of_a_tokens_choices_changes_nothing() -> None:
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(9, TOP_K, generator=torch.Generator().manual_seed(2))
    ids = choices("spread", 9)
    y = fused_experts(x, ids, scale, *weights(torch.float32))
    assert torch.equal(y, fused_experts(x, ids.flip(1), scale.flip(1), *weights(torch.float32)))


def test_partial_sums_of_two_halves_make_the_whole() -> None:
    x = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = torch.rand(33, TOP_K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids, (gate_up, down) = choices("spread", 33), weights(torch.float64)
    first = fused_experts(x, torch.where(ids < 4, ids, -1), scale, gate_up[:4], down[:4])
    second = fused_experts(x, torch.where(ids >= 4, ids - 4, -1), scale, gate_up[4:], down[4:])
    assert_near(first + second, by_hand(x, ids, scale, gate_up, down))


def test_an_unknown_implementation_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError,
        match="grouped_gemm has no implementation 'cuda'; it has \\['cpu', 'float32', 'reference', 'triton'\\]",
    ):
        fused_experts(
            torch.ones(1, HIDDEN),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1),
            *weights(torch.float32),
            implementation="cuda",
        )
