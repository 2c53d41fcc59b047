"""From measured rounds to the numbers that are printed, kept and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from moe_runtime.bench.offline import warn_if_short
from moe_runtime.bench.scaling.attribution import PhaseCost, attribute, explain
from moe_runtime.bench.scaling.measure import Measurements
from moe_runtime.bench.scaling.phases import ServedRound, TimedRound, median_round
from moe_runtime.bench.scaling.workload import Layout, ScalingWorkload
from moe_runtime.errors import ConfigError


def make_results(measured: Measurements, workload: ScalingWorkload) -> list[dict[str, Any]]:
    """One entry for each mode, phase and layout, in that order.

    Raises:
        ConfigError: some round had no step without prompts, so that decode cannot be told.
    """
    results = []
    for mode in workload.modes:
        # In the order in which they were started, the smallest first.
        rounds = {layout: _Rounds(measured, mode, layout) for layout in measured.facts}
        for phase in workload.phases:
            _check_phase(rounds, mode, phase, workload)
            results += _phase_results(mode, phase, rounds, workload)
    return results


class _Rounds:
    """What was measured of one deployment in one mode."""

    def __init__(self, measured: Measurements, mode: str, layout: Layout) -> None:
        self.served = measured.served[mode, layout]
        self.timed = measured.timed[mode, layout]
        self.read_speeds = measured.read_speeds[mode, layout]
        self.facts = measured.facts[layout]
        self._layout = layout

    def cost(self, phase: str) -> PhaseCost:
        """Of the median round of each kind."""
        return PhaseCost(
            num_ranks=self._layout.num_ranks,
            served=median_round(self.served, phase).phases[phase],
            timed=median_round(self.timed, phase).phases[phase],
        )

    def rates(self, phase: str) -> list[float]:
        """Tokens a second of each served round."""
        return [sample.phases[phase].tokens_per_s for sample in self.served]


def _check_phase(rounds: dict[Layout, _Rounds], mode: str, phase: str, workload: ScalingWorkload) -> None:
    for layout, measured in rounds.items():
        samples: list[ServedRound | TimedRound] = [*measured.served, *measured.timed]
        if any(phase not in sample.phases for sample in samples):
            raise ConfigError(
                f"a round of {layout.label} had no step without prompts, so decode was not measured; raise "
                f"output_len above {workload.output_len}, or set it to 1"
            )
        seconds = median_round(measured.served, phase).phases[phase].seconds
        warn_if_short(f"{mode} scaling, {layout.label}: {phase}", seconds)


def _phase_results(
    mode: str, phase: str, rounds: dict[Layout, _Rounds], workload: ScalingWorkload
) -> list[dict[str, Any]]:
    base = next(layout for layout in rounds if layout.same_cores_as is None)
    alone = {layout.same_cores_as: rounds[layout].rates(phase) for layout in rounds if layout.same_cores_as}
    entries = []
    for layout, measured in rounds.items():
        entry = _describe(mode, phase, layout, measured, workload)
        rates = measured.rates(phase)
        entry["speedup_of_rounds"] = _ratio(rates, rounds[base].rates(phase))
        if layout.same_cores_as is None:
            compared = attribute(rounds[base].cost(phase), measured.cost(phase))
            entry["speedup"] = round(compared.speedup, 4)
            entry["efficiency"] = round(compared.efficiency, 4)
            entry["loss"] = {part: round(share, 4) for part, share in compared.loss.items()}
            entry["loss_of_groups"] = {name: round(share, 4) for name, share in compared.of_groups().items()}
            if layout is not base:
                entry["explanation"] = explain(compared, layout.num_ranks, base.num_ranks)
        if layout.same_cores_as is None and layout.num_ranks in alone:
            entry["ratio_to_same_cores"] = _ratio(rates, alone[layout.num_ranks])
        entries.append(entry)
    return entries


def _describe(
    mode: str, phase: str, layout: Layout, measured: _Rounds, workload: ScalingWorkload
) -> dict[str, Any]:
    """What is true of a layout by itself: rates of the median served round, the split of the median timed one."""
    whole = median_round(measured.timed, phase)
    served, timed = median_round(measured.served, phase).phases[phase], whole.phases[phase]
    facts = measured.facts
    taken = [1 / rate for rate in measured.rates(phase)]
    return {
        "mode": mode,
        "phase": phase,
        "layout": layout.label,
        "expert_parallel_size": layout.num_ranks,
        "threads_per_rank": list(facts.threads),
        "same_cores_as": layout.same_cores_as,
        "nodes": len(set(facts.nodes)),
        "dispatcher": facts.dispatcher,
        "requests": workload.num_requests(mode, layout),
        "round_seconds": [round(sample.seconds, 4) for sample in measured.served],
        "read_gb_per_s_of_rounds": [
            None if speed is None else round(speed / 1e9, 1) for speed in measured.read_speeds
        ],
        "tokens": round(served.tokens, 2),
        "seconds": round(served.seconds, 9),
        "tokens_per_s": round(served.tokens_per_s, 2),
        "slowest_by_fastest": round(max(taken) / min(taken), 3),
        "timed_round_seconds": [round(sample.seconds, 4) for sample in measured.timed],
        "timed_tokens": timed.tokens,
        "timed_seconds": round(timed.seconds, 9),
        "steps": timed.steps,
        "parts_ms_of_step": _scaled(timed.mean, 1e3 / timed.steps),
        "parts_ms_of_step_of_ranks": [_scaled(rank, 1e3 / timed.steps) for rank in timed.ranks],
        "parts_us_of_token": _scaled(timed.mean, 1e6 / timed.tokens),
        "sent_bytes_of_token": {name: round(sent, 1) for name, sent in whole.sent_bytes.items()},
        "rank_balancedness": _rounded(whole.rank_balancedness),
        "expert_balancedness": _rounded(whole.expert_balancedness),
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of how many times as fast, round by round, so that the machine's moods cancel out."""
    return round(median(mine / other for mine, other in zip(ours, theirs, strict=True)), 4)


def _scaled(parts: Any, factor: float) -> dict[str, float]:
    return {part: round(seconds * factor, 4) for part, seconds in parts.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
