"""`bench scaling` from its arguments to its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe_runtime.bench.report import Report, load_average
from moe_runtime.bench.scaling.measure import measure
from moe_runtime.bench.scaling.results import make_results
from moe_runtime.bench.scaling.tables import make_tables
from moe_runtime.bench.scaling.workload import ScalingWorkload
from moe_runtime.experts.trace import RoutingTrace


def run_scaling(
    model: str | None,
    workload: ScalingWorkload,
    llm_args: Mapping[str, Any],
    replay_routing: str | None = None,
) -> Report:
    """Measure every layout and say where the loss goes.

    Args:
        model: as in LLM.
        llm_args: further arguments of LLM, but for `expert_parallel_size`.
        replay_routing: file of a trace whose choices take the place of the routers'.

    Raises:
        UserError: whatever LLM refuses, or `measure`.
    """
    started_load = load_average()
    trace = None if replay_routing is None else RoutingTrace.load(replay_routing)
    measured = measure(model, workload, llm_args, trace)
    results = make_results(measured, workload)
    first = next(iter(measured.facts.values()))
    return Report(
        benchmark="scaling",
        device=first.devices[0],
        started_load=started_load,
        workload={
            **measured.model,
            **asdict(workload),
            "num_served_rounds": workload.num_served,
            "num_timed_rounds": workload.num_timed,
            "interleaved": measured.interleaved,
            "threads_of_ranks": {
                layout.label: list(facts.threads) for layout, facts in measured.facts.items()
            },
            "replay_routing": replay_routing,
        },
        results=results,
        tables=make_tables(results, workload),
    )
