"""Ranks that count what a test tells them, and a clock that goes when it is told to."""

from __future__ import annotations

import dataclasses

from moe_runtime.rank_spec import RankReport, RankStats
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.scheduler.stats import SchedulerStats
from moe_runtime.step_loop import LoopStats
from moe_runtime.timing.parts import Part

LAYERS = (0, 2)
EXPERTS_OF_RANK = ((0, 1), (2, 3))


class FakeClock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeRanks:
    """Two ranks, two sparse layers, four experts."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.failure: Exception | None = None
        self.scheduler = [
            {f.name: 0 for f in dataclasses.fields(SchedulerStats)} | {"blocks_total": 10, "slots_total": 4}
            for _ in EXPERTS_OF_RANK
        ]
        self.loop = [dataclasses.asdict(LoopStats()) for _ in EXPERTS_OF_RANK]
        self.expert_tokens = [[[0, 0], [0, 0]] for _ in EXPERTS_OF_RANK]
        self.step_parts = [{part.label: 0.0 for part in Part} for _ in EXPERTS_OF_RANK]
        self.step_sizes = [[0] * 4 for _ in EXPERTS_OF_RANK]

    def stats(self) -> list[RankStats]:
        self.num_asked += 1
        if self.failure is not None:
            raise self.failure
        return [
            RankStats(
                rank=rank,
                scheduler=dict(self.scheduler[rank]),
                loop=dict(self.loop[rank]),
                step_parts=dict(self.step_parts[rank]),
                step_sizes=tuple(self.step_sizes[rank]),
                moe_layers=LAYERS,
                local_experts=experts,
                expert_tokens=tuple(map(tuple, self.expert_tokens[rank])),
            )
            for rank, experts in enumerate(EXPERTS_OF_RANK)
        ]

    def compute(self, layer: int, expert: int, tokens: int) -> None:
        """Tokens for an expert, both by position."""
        self.expert_tokens[expert // 2][layer][expert % 2] += tokens


def make_report(rank: int) -> RankReport:
    return RankReport(
        rank=rank,
        node_ip="10.0.0.1",
        pid=1,
        gpu_ids=(),
        device="a CPU",
        kernel_plan=(),
        dispatcher="shared_memory: the 2 ranks are on one host",
        num_local_experts=2,
        weight_bytes=0,
        cache_bytes=0,
        cache_tokens=160,
        max_model_len=100,
        threads=1,
    )


def make_samples(name: str, clock: FakeClock, count: int = 1, prompt: int = 3) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=name,
            sample_index=index,
            prompt_token_ids=tuple(range(prompt)),
            params=SamplingParams(n=count),
            seed=0,
            arrival_time=clock.now,
        )
        for index in range(count)
    ]
