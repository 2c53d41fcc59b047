"""route against softmax and sorting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moe_kernels.routing import route
from tests.kernels.implementations import DTYPES, every_implementation
from tests.kernels.packing import assert_near

implementation = every_implementation(route)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(7, 1), (7, 7), (65, 10)])
def test_equals_sorted_softmax(experts: int, top_k: int, renormalize: bool, dtype: torch.dtype) -> None:
    # Distinct by construction, in bfloat16 too, so that the order is beyond doubt.
    order = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(s)) for s in range(5)]
    )
    logits = (order * 0.25 - 3).to(dtype)
    ids, weights = route(logits, top_k, renormalize)
    assert ids.dtype == torch.int64
    assert weights.dtype == dtype
    wanted = torch.empty(5, top_k, dtype=torch.float64)
    for row in range(5):
        values = logits[row].tolist()
        ranked = sorted(range(experts), key=lambda e: -values[e])[:top_k]
        assert ids[row].tolist() == ranked
        over = ranked if renormalize else range(experts)
        total = math.fsum(math.exp(values[e]) for e in over)
        wanted[row] = torch.tensor([math.exp(values[e]) / total for e in ranked], dtype=torch.float64)
    assert_near(weights, wanted)


def test_large_bfloat16_logits_do_not_overflow() -> None:
    _, weights = route(torch.tensor([[3e4, -3e4, 2.9e4]], dtype=torch.bfloat16), 2, True)
    assert weights.tolist() == [[1.0, 0.0]]


def test_equal_logits_choose_distinct_experts() -> None:
    ids, _ = route(torch.zeros(2, 7), 5, True)
    assert [len(set(row)) for row in ids.tolist()] == [5, 5]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_experts_of_a_row_of_nan_are_there() -> None:
    ids, _ = route(torch.full((2, 7), math.nan), 5, True)
    assert ids.ge(0).all()
    assert ids.lt(7).all()


def test_no_tokens() -> None:
    ids, weights = route(torch.empty(0, 8), 3, True)
    assert ids.shape == weights.shape == (0, 3)
