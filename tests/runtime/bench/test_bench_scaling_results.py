"""`bench scaling`: from rounds to results, whatever the order in which deployments took their turns."""

from __future__ import annotations

import pytest

from moe_runtime.bench.scaling.measure import LayoutFacts, Measurements
from moe_runtime.bench.scaling.phases import PARTS, PhaseRate, PhaseSample, ServedRound, TimedRound
from moe_runtime.bench.scaling.results import make_results
from moe_runtime.bench.scaling.tables import make_tables
from moe_runtime.bench.scaling.workload import Layout, ScalingWorkload
from moe_runtime.errors import ConfigError

ONE, TWO = Layout(num_ranks=1, threads=1), Layout(num_ranks=2, threads=1)
ALONE = Layout(num_ranks=1, threads=2, same_cores_as=2)
WORKLOAD = ScalingWorkload(mode="strong", same_cores=True, num_rounds=6)
SLOWER = 1.25  # a round is where its steps are timed


def _served(seconds: float, *phases: str) -> ServedRound:
    phase = PhaseRate(seconds=seconds, tokens=60)
    return ServedRound(seconds=seconds * len(phases), phases=dict.fromkeys(phases, phase))


def _timed(seconds: float, num_ranks: int, *phases: str) -> TimedRound:
    parts = {**dict.fromkeys(PARTS, 0.0), "experts": seconds}
    sample = PhaseSample(seconds=seconds, tokens=60, steps=4, ranks=(parts,) * num_ranks)
    return TimedRound(
        seconds=seconds * len(phases),
        phases=dict.fromkeys(phases, sample),
        sent_bytes={"dispatch": 0.0, "combine": 0.0},
        rank_balancedness=1.0,
        expert_balancedness=None,
    )


def _measured(*phases: str) -> Measurements:
    taken = {
        ALONE: (2.0, 4.0, 3.0),
        TWO: (2.5, 5.0, 3.0),
        ONE: (4.0, 8.0, 6.0),
    }  # the last is first in a turn
    facts = LayoutFacts(threads=(1,), devices=("chip",), nodes=("here",), dispatcher="local")
    return Measurements(
        served={
            ("strong", layout): [_served(s, *phases) for s in seconds] for layout, seconds in taken.items()
        },
        timed={
            ("strong", layout): [_timed(SLOWER * s, layout.num_ranks, *phases) for s in seconds]
            for layout, seconds in taken.items()
        },
        read_speeds={("strong", layout): [3.04e10, None, 5e10] for layout in taken},
        facts=dict.fromkeys((ONE, TWO, ALONE), facts),
        model={},
        interleaved=True,
    )


def test_results_compare_with_the_smallest_and_with_one_rank_of_all_cores() -> None:
    results = make_results(_measured("prefill", "decode"), WORKLOAD)
    assert [(r["phase"], r["layout"]) for r in results] == [
        (phase, layout.label) for phase in ("prefill", "decode") for layout in (ONE, TWO, ALONE)
    ]
    one, two, alone = results[3:]
    assert (one["tokens_per_s"], two["tokens_per_s"], alone["tokens_per_s"]) == (10.0, 20.0, 20.0)
    assert (one["efficiency"], two["speedup"], two["efficiency"]) == (1.0, 2.0, 1.0)
    assert two["speedup_of_rounds"] == 1.6  # of 1.6, 1.6 and 2
    assert two["ratio_to_same_cores"] == 0.8  # of 0.8, 0.8 and 1
    assert (two["seconds"], two["timed_seconds"]) == (3.0, 3.75)
    assert two["parts_ms_of_step"]["experts"] == 937.5
    assert two["loss"]["untimed"] == 0.0  # timing costs both the same
    assert "explanation" in two
    assert not {"explanation", "ratio_to_same_cores"} & one.keys()
    assert not {"efficiency", "loss"} & alone.keys()
    throughput, split, loss = make_tables(results, WORKLOAD)
    assert "median of 3 rounds as served" in throughput.title
    assert "median of 3 rounds with every step timed" in split.title
    assert throughput.rows[4][-1] == "0.80"
    assert two["read_gb_per_s_of_rounds"] == [30.4, None, 50.0]
    assert throughput.rows[4][throughput.columns.index("reads, GB/s")] == "30 to 50"
    assert [row[0] for row in split.rows[6:9]] == [
        "strong, decode, EP=2, 1 thread each, 4 steps",
        "  rank 0",
        "  rank 1",
    ]
    assert [row[:2] for row in loss.rows] == [
        ("strong, prefill, EP=2, 1 thread each", "0.0"),
        ("strong, decode, EP=2, 1 thread each", "0.0"),
    ]


def test_rounds_without_a_step_of_decodes_alone_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="no step without prompts, so decode was not measured; raise output_len"
    ):
        make_results(_measured("prefill"), WORKLOAD)
