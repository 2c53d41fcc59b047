"""The division of experts over ranks."""

from __future__ import annotations

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.experts.placement import ExpertPlacement


@pytest.mark.parametrize(("experts", "ranks"), [(8, 1), (8, 2), (7, 2), (7, 3), (5, 5), (512, 24)])
def test_every_expert_stands_on_exactly_one_rank(experts: int, ranks: int) -> None:
    placement = ExpertPlacement.contiguous(experts, ranks)
    sizes = [len(local) for local in placement.experts_of_rank]
    assert sorted(e for local in placement.experts_of_rank for e in local) == list(range(experts))
    assert max(sizes) - min(sizes) <= 1
    assert [placement.experts_of_rank[r].count(e) for e, r in enumerate(placement.rank_of_expert())] == [
        1
    ] * experts


def test_more_ranks_than_experts_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="expert_parallel_size=9 is larger than the model's 8 experts"):
        ExpertPlacement.contiguous(8, 9)
