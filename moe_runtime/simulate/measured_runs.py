"""Measured runs on CPUs beside what is predicted for them, and the ratios between EP sizes.

A round submits all its requests at once: every rank prefills its share, then decodes it to the end. The slowest rank,
which has one request more where they do not divide evenly, decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.config import EngineConfig
from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.dispatch import DispatchPlan
from moe_runtime.simulate.hardware import CPU_THREAD, Hardware, cpu_rank
from moe_runtime.simulate.measured_points import DECODE, PREFILL, MeasuredPoint, read_points
from moe_runtime.simulate.routing import Layout, ZipfRouting
from moe_runtime.simulate.step import PARTS, Step, StepTime, step_time

_MAX_TOKENS = EngineConfig().max_num_batched_tokens  # of a step, unless the run said otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is predicted for one point."""

    tokens_per_s: float
    step: StepTime  # a step of the phase; of a whole batch, a decode step


@dataclass(frozen=True, slots=True)
class PointComparison:
    """One point and its prediction."""

    point: MeasuredPoint
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative: 0.1 is a tenth too fast."""
        return self.predicted.tokens_per_s / self.point.tokens_per_s - 1

    @property
    def label(self) -> str:
        p = self.point
        threads = f"{p.threads_per_rank} thread{'s'[: p.threads_per_rank > 1]} a rank"
        return f"{p.model.name}, EP{p.num_ranks}, {threads}, {p.requests} requests, {p.phase}"

    def to_dict(self) -> dict[str, Any]:
        """For the JSON object."""
        p = self.point
        return {
            "file": p.path,
            "model": p.model.name,
            "expert_parallel_size": p.num_ranks,
            "threads_per_rank": p.threads_per_rank,
            "same_cores_as": p.same_cores_as,
            "requests": p.requests,
            "phase": p.phase,
            "measured_tokens_per_s": p.tokens_per_s,
            "predicted_tokens_per_s": round(self.predicted.tokens_per_s, 2),
            "error": round(self.error, 3),
            "measured_parts_ms": p.parts_ms and dict(p.parts_ms),
            "predicted_parts_ms": _parts_ms(self.predicted.step),
            "load_average_before": p.load_average,
        }


def predict(point: MeasuredPoint, thread: Hardware = CPU_THREAD) -> Prediction:
    """Tokens/s of the whole deployment in one round, or in one phase of it."""
    deployment = _deployment(point, thread)
    sequences = -(-point.requests // point.num_ranks)
    prompt_tokens = sequences * point.input_len
    steps = -(-prompt_tokens // _MAX_TOKENS)
    prefill = step_time(
        deployment, Step(tokens=-(-prompt_tokens // steps), context=point.input_len, is_prefill=True)
    )
    decode = step_time(deployment, Step(tokens=sequences, context=point.input_len + point.output_len / 2))
    if point.phase == PREFILL:
        rate = point.requests * point.input_len / (steps * prefill.total)
        return Prediction(tokens_per_s=rate, step=prefill)
    if point.phase == DECODE:
        return Prediction(tokens_per_s=point.requests / decode.total, step=decode)
    seconds = steps * prefill.total + (point.output_len - 1) * decode.total
    return Prediction(tokens_per_s=point.requests * point.output_len / seconds, step=decode)


def run_measured(paths: Sequence[str], thread: Hardware = CPU_THREAD) -> Report:
    """The report of `simulate --measured FILE ...`.

    Raises:
        ConfigError: a file cannot be used.
    """
    started_load = load_average()
    comparisons = [PointComparison(point, predict(point, thread)) for point in read_points(paths)]
    ratios = _ratios(comparisons)
    tables = [_table(comparisons), *([_ratio_table(ratios)] if ratios else [])]
    if any(c.point.parts_ms for c in comparisons):
        tables.append(_parts_table(comparisons))
    return Report(
        benchmark="simulate-measured",
        device="none: computed",
        started_load=started_load,
        workload={"thread": thread.source, "memory": _memory(thread), "files": list(paths)},
        results=[*(c.to_dict() for c in comparisons), *ratios],
        tables=tables,
    )


def _deployment(point: MeasuredPoint, thread: Hardware) -> Deployment:
    model = point.model
    return Deployment(
        model=model,
        hardware=cpu_rank(point.threads_per_rank, thread, ranks_on_host=point.num_ranks),
        layout=Layout(num_ranks=point.num_ranks, ranks_per_node=point.num_ranks, placement="contiguous"),
        routing=ZipfRouting(model.num_experts, model.top_k),
        dispatch=DispatchPlan(kind="shared_memory", wire_dtype="bfloat16"),
    )


def _memory(thread: Hardware) -> str:
    """What the ranks of a host are taken to read together."""
    if thread.host_bytes_per_s is None:
        return "no limit on all threads together: read_gb_per_s_all was not measured"
    return f"at most {thread.host_bytes_per_s / 1e9:.1f} GB/s for all threads together"


def _ratios(comparisons: Sequence[PointComparison]) -> list[dict[str, Any]]:
    """Throughput of more ranks by that of the fewest, and by that of one rank with as many threads.

    The first at the same requests (strong) and at the same requests a rank (weak), the second at the same requests.
    """
    growing = [c for c in comparisons if c.point.same_cores_as is None]
    fewest = min((c.point.num_ranks for c in growing), default=1)
    # What was measured twice counts as it was measured first.
    base = {(c.point.phase, c.point.requests): c for c in reversed(growing) if c.point.num_ranks == fewest}
    alone = {
        (c.point.same_cores_as, c.point.phase, c.point.requests): c
        for c in reversed(comparisons)
        if c.point.same_cores_as is not None
    }
    ratios = []
    for c in growing:
        p = c.point
        name = f"EP{p.num_ranks}/EP{fewest}"
        for mode, requests in (("strong", p.requests), ("weak", p.requests * fewest // p.num_ranks)):
            if p.num_ranks > fewest and (b := base.get((p.phase, requests))):
                ratios.append(_ratio(name, mode, c, b))
        if rank := alone.get((p.num_ranks, p.phase, p.requests)):
            name = f"{p.num_ranks} ranks / one rank of {rank.point.threads_per_rank} threads"
            ratios.append(_ratio(name, "same cores", c, rank))
    return [r for i, r in enumerate(ratios) if r not in ratios[:i]]


def _ratio(name: str, mode: str, over: PointComparison, under: PointComparison) -> dict[str, Any]:
    return {
        "ratio": name,
        "mode": mode,
        "phase": over.point.phase,
        "requests": over.point.requests,
        "measured": round(over.point.tokens_per_s / under.point.tokens_per_s, 3),
        "predicted": round(over.predicted.tokens_per_s / under.predicted.tokens_per_s, 3),
    }


def _parts_ms(step: StepTime) -> dict[str, float]:
    return {part: round(1e3 * getattr(step, part), 3) for part in PARTS}


def _table(comparisons: Sequence[PointComparison]) -> TextTable:
    rows = tuple(
        (
            c.label,
            f"{c.point.tokens_per_s:,.1f}",
            f"{c.predicted.tokens_per_s:,.1f}",
            f"{c.error:+.0%}",
            f"{c.point.load_average:.1f}",
        )
        for c in comparisons
    )
    return TextTable(
        title="Tokens/s of the deployment: output tokens of whole batches, or those of a phase",
        columns=("deployment", "measured", "predicted", "error", "load before"),
        rows=rows,
    )


def _ratio_table(ratios: Sequence[Mapping[str, Any]]) -> TextTable:
    rows = tuple(
        (
            f"{r['ratio']}, {r['mode']}, {r['phase']}, {r['requests']} requests",
            f"{r['measured']:.2f}",
            f"{r['predicted']:.2f}",
            f"{r['predicted'] / r['measured'] - 1:+.0%}",
        )
        for r in ratios
    )
    return TextTable(title="Scaling", columns=("ratio", "measured", "predicted", "error"), rows=rows)


def _parts_table(comparisons: Sequence[PointComparison]) -> TextTable:
    """Milliseconds of a step by parts; what happens outside of steps is not predicted."""
    rows = []
    for c in comparisons:
        if c.point.parts_ms:
            found = _parts_ms(c.predicted.step)
            cells = (f"{c.point.parts_ms.get(part, 0.0):.1f} / {found[part]:.1f}" for part in PARTS)
            rows.append((c.label, *cells))
    return TextTable(
        title="Parts of a step, ms: measured / predicted", columns=("deployment", *PARTS), rows=tuple(rows)
    )
