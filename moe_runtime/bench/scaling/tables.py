"""The tables of `bench scaling`: throughput, the split of a step, and where the loss goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.bench.report import TextTable
from moe_runtime.bench.scaling.attribution import GROUPS
from moe_runtime.bench.scaling.phases import PARTS
from moe_runtime.bench.scaling.workload import ScalingWorkload

Results = Sequence[Mapping[str, Any]]


def make_tables(results: Results, workload: ScalingWorkload) -> list[TextTable]:
    """All tables, in the order in which they are read."""
    return [_throughput(results, workload), _split(results, workload), _loss(results)]


def _throughput(results: Results, workload: ScalingWorkload) -> TextTable:
    columns = ["", "requests", "tokens/s", "speed-up", "by rounds", "efficiency", "spread"]
    columns += ["reads, GB/s", "rank balance", "expert balance", "bytes/token out", "back"]
    with_cores = any("ratio_to_same_cores" in result for result in results)
    rows = []
    for result in results:
        row = [_name(result), f"{result['requests']}", f"{result['tokens_per_s']:,.1f}"]
        row += [_number(result.get("speedup"), ".2f"), f"{result['speedup_of_rounds']:.2f}"]
        row += [_number(result.get("efficiency"), ".1%"), f"{result['slowest_by_fastest']:.2f}"]
        row.append(read_range(result) or "-")
        row += [_number(result[f"{what}_balancedness"], ".2f") for what in ("rank", "expert")]
        row += [f"{result['sent_bytes_of_token'][name]:,.0f}" for name in ("dispatch", "combine")]
        if with_cores:
            row.append(_number(result.get("ratio_to_same_cores"), ".2f"))
        rows.append(tuple(row))
    if with_cores:
        columns.append("to 1 rank, same cores")
    return TextTable(
        title=f"Throughput, median of {workload.num_served} rounds as served; spread is the slowest by the fastest",
        columns=tuple(columns),
        rows=tuple(rows),
    )


def _split(results: Results, workload: ScalingWorkload) -> TextTable:
    rows = []
    for result in results:
        whole = {"": result["parts_ms_of_step"]}
        ranks = result["parts_ms_of_step_of_ranks"]
        if len(ranks) > 1:
            whole |= {f"  rank {rank}": parts for rank, parts in enumerate(ranks)}
        for which, parts in whole.items():
            name = which or f"{_name(result)}, {result['steps']} steps"
            cells = [f"{parts[part]:.3f}" for part in PARTS]
            rows.append((name, f"{sum(parts.values()):.3f}", *cells))
    return TextTable(
        title=f"Milliseconds a step, mean over ranks, median of {workload.num_timed} rounds with every step timed",
        columns=("", "step", *PARTS),
        rows=tuple(rows),
    )


def _loss(results: Results) -> TextTable:
    rows = []
    for result in results:
        if "explanation" in result:
            shares = [f"{100 * result['loss_of_groups'][name]:+.1f}" for name in GROUPS]
            rows.append((_name(result), f"{100 * (1 - result['efficiency']):.1f}", *shares))
    return TextTable(
        title="Where the loss goes: points of efficiency as served, which add up to what is missing to 100",
        columns=("", "missing", *GROUPS),
        rows=tuple(rows),
    )


def read_range(result: Mapping[str, Any]) -> str | None:
    """From the slowest to the fastest at which the ranks read their weights before a round, in GB/s; None: unknown."""
    speeds = [speed for speed in result["read_gb_per_s_of_rounds"] if speed is not None]
    return f"{min(speeds):.0f} to {max(speeds):.0f}" if speeds else None


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['mode']}, {result['phase']}, {result['layout']}"


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
