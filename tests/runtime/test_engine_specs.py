"""What the engine tells each rank."""

from __future__ import annotations

from moe_runtime.cluster import Placement, RankSlot
from moe_runtime.config import EngineConfig
from moe_runtime.engine import rank_specs
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.modelfiles import resolve_model
from moe_runtime.registry import resolve_target


def test_ranks_know_their_neighbours_on_the_node() -> None:
    files = resolve_model(None)
    slots = Placement(None, tuple(RankSlot(bundle, node) for bundle, node in enumerate("aaabb")))
    experts = ExpertPlacement.contiguous(64, 5)
    specs = rank_specs(
        slots, files, resolve_target(files.config), experts, EngineConfig(expert_parallel_size=5)
    )
    assert [spec.rank for spec in specs] == [0, 1, 2, 3, 4]
    assert [(spec.index_on_node, spec.ranks_on_node) for spec in specs] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (0, 2),
        (1, 2),
    ]
