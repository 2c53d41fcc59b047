"""SlotPlacement: which rank holds which copy of which expert, redundant copies included.

Shape legend: E logical experts, S slots (physical experts) of all ranks, R ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.experts.placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class SlotPlacement:
    """One entry for each slot; an expert's tokens are shared equally among its copies."""

    num_ranks: int
    expert_of_slot: NDArray[np.int64]  # [S]
    rank_of_slot: NDArray[np.int64]  # [S]

    @property
    def copies(self) -> NDArray[np.int64]:
        """Copies of each expert, [E]."""
        return np.bincount(self.expert_of_slot)

    @property
    def slots_per_rank(self) -> int:
        """Slots of the fullest rank."""
        return int(np.bincount(self.rank_of_slot).max())

    def per_rank(self, of_slot: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over each rank's slots, [R]."""
        return np.bincount(self.rank_of_slot, of_slot, self.num_ranks).astype(np.float64)


def contiguous(popularity_E: NDArray[np.float64], num_ranks: int, num_redundant: int) -> SlotPlacement:
    """Equal runs of neighbours, as the runtime places experts; redundant copies go to experts in turn."""
    num_experts = len(popularity_E)
    num_slots = num_experts + num_redundant
    experts = np.sort(np.arange(num_slots) % num_experts)
    runs = ExpertPlacement.contiguous(num_slots, num_ranks)
    return SlotPlacement(num_ranks, experts, np.array(runs.rank_of_expert()))


def balanced(popularity_E: NDArray[np.float64], num_ranks: int, num_redundant: int) -> SlotPlacement:
    """Copies to the hottest experts, then each slot, hottest first, to the least loaded rank with room.

    The greedy scheme of DeepSeek's EPLB without its groups of nodes.
    """
    copies = np.ones(len(popularity_E), dtype=np.int64)
    for _ in range(num_redundant):
        copies[np.argmax(popularity_E / copies)] += 1
    experts = np.repeat(np.arange(len(copies)), copies)
    loads = (popularity_E / copies)[experts]
    room = np.bincount(np.arange(len(experts)) % num_ranks, minlength=num_ranks)
    ranks = np.empty(len(experts), dtype=np.int64)
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for slot in np.argsort(-loads, kind="stable"):
        load, rank = heapq.heappop(heap)
        ranks[slot] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(heap, (load + loads[slot], rank))
    return SlotPlacement(num_ranks, experts, ranks)


PLACEMENTS: Mapping[str, Callable[[NDArray[np.float64], int, int], SlotPlacement]] = {
    "contiguous": contiguous,
    "balanced": balanced,
}
