"""Sweep: one deployment at growing EP sizes: throughput, where a step's time goes, and where scaling breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError
from moe_runtime.simulate import search
from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.mending import MENDINGS, Mending, mend
from moe_runtime.simulate.search import Operation
from moe_runtime.simulate.step import PARTS

# A GPU has to keep so much of what it gave at the best smaller EP size; below that, scaling is called broken.
BREAK_BELOW = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepWorkload:
    """What the ranks do."""

    phase: str = "decode"  # or "prefill"
    input_len: int = 2000  # tokens of a prompt
    output_len: int = 1000  # tokens generated for each
    tpot_slo_ms: float | None = 50.0  # decode: no step takes longer
    batch: int | None = None  # decode: exactly so many sequences a rank, instead of as many as fit
    prefill_tokens: int = 8192  # prefill: tokens of a rank in one step

    def __post_init__(self) -> None:
        if self.phase not in ("decode", "prefill"):
            raise ConfigError(f"--phase must be decode or prefill, got {self.phase!r}")
        for flag, value, least in (
            ("--input-len", self.input_len, 1),
            ("--output-len", self.output_len, 0),
            ("--batch-per-gpu", self.batch, 1),
            ("--prefill-tokens", self.prefill_tokens, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{flag} must be at least {least}, got {value}")
        if self.tpot_slo_ms is not None and not self.tpot_slo_ms > 0:
            raise ConfigError(f"--tpot-slo-ms must be above 0, got {self.tpot_slo_ms}")

    def operate(self, deployment: Deployment) -> Operation:
        """Run a deployment this way."""
        if self.phase == "prefill":
            return search.prefill(deployment, self.input_len, self.prefill_tokens)
        slo = None if self.tpot_slo_ms is None else self.tpot_slo_ms / 1e3
        return search.decode(deployment, self.input_len, self.output_len, tpot_s=slo, batch=self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One EP size."""

    deployment: Deployment
    operation: Operation
    mendings: Sequence[Mending]  # best first

    @property
    def ep_size(self) -> int:
        return self.deployment.layout.num_ranks

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.operation.tokens_per_s

    @property
    def limiting_part(self) -> str:
        """The part that takes most of a step."""
        split = self.operation.time.split if self.operation.time else {}
        return max(split, key=lambda part: split[part], default="-")

    def to_dict(self) -> dict[str, Any]:
        """For the JSON object."""
        o, time = self.operation, self.operation.time
        return {
            "expert_parallel_size": self.ep_size,
            "experts_per_gpu": self.deployment.experts_per_rank,
            "weight_bytes_per_gpu": round(self.deployment.weight_bytes),
            "batch_per_gpu": o.batch,
            "tokens_per_s_per_gpu": round(self.tokens_per_s, 1),
            "tokens_per_s": round(self.tokens_per_s * self.ep_size),
            "step_ms": round(1e3 * time.total, 3) if time else None,
            "split": {part: round(share, 4) for part, share in time.split.items()} if time else None,
            "imbalance": round(time.imbalance, 3) if time else None,
            "limiting_part": self.limiting_part,
            "batch_limited_by": o.limited_by,
            "gains": {m.name: round(m.gain, 3) for m in self.mendings},
        }


def sweep(deployment: Deployment, ep_sizes: Sequence[int], workload: SweepWorkload) -> list[SweepPoint]:
    """The deployment at each EP size."""
    return [_point(at_size(deployment, size), workload.operate) for size in ep_sizes]


def at_size(deployment: Deployment, ep_size: int) -> Deployment:
    """The same on so many ranks."""
    return replace(deployment, layout=replace(deployment.layout, num_ranks=ep_size))


def breaks_at(points: Sequence[SweepPoint]) -> SweepPoint | None:
    """The first EP size whose GPUs give less than BREAK_BELOW of the best smaller size; None where none does."""
    best = 0.0
    for point in points:
        if 0 < point.tokens_per_s < BREAK_BELOW * best:
            return point
        best = max(best, point.tokens_per_s)
    return None


def verdict(points: Sequence[SweepPoint]) -> str:
    """One or two sentences: where scaling breaks, and what would mend it."""
    broken = breaks_at(points)
    running = [p for p in points if p.operation.time]
    if not running:
        return "Nothing fits at any of these sizes."
    if broken is None:
        return f"A GPU never gives less than {BREAK_BELOW:.0%} of the best smaller size up to EP {running[-1].ep_size}."
    best = max((p for p in points if p.ep_size < broken.ep_size), key=lambda p: p.tokens_per_s)
    grown = _grown_part(best, broken)
    text = (
        f"Scaling breaks at EP {broken.ep_size}: a GPU gives {broken.tokens_per_s / best.tokens_per_s:.0%} of what "
        f"it gives at EP {best.ep_size}; {grown}."
    )
    if _helps(broken):
        text += f" Best mended by {broken.mendings[0].name}: x {broken.mendings[0].gain:.2f}."
    return text


def report(points: Sequence[SweepPoint], workload: SweepWorkload, facts: Mapping[str, Any]) -> Report:
    """The report of a sweep."""
    return Report(
        benchmark="simulate",
        device="none: computed",
        started_load=load_average(),
        workload={**facts, "verdict": verdict(points)},
        results=[point.to_dict() for point in points],
        tables=[_table(points, workload), _mending_table(points)],
    )


def _point(deployment: Deployment, operate: Callable[[Deployment], Operation]) -> SweepPoint:
    operation = operate(deployment)
    return SweepPoint(
        deployment=deployment, operation=operation, mendings=mend(deployment, operate, operation)
    )


def _grown_part(before: SweepPoint, after: SweepPoint) -> str:
    """The part whose time a token grew most."""
    was, now = before.operation, after.operation
    growth = {
        part: getattr(now.time, part) / now.batch - getattr(was.time, part) / was.batch for part in PARTS
    }
    part = max(growth, key=lambda name: growth[name])
    return f"{part} grew most, by {1e6 * growth[part]:.1f} us a token"


def _table(points: Sequence[SweepPoint], workload: SweepWorkload) -> TextTable:
    batch = "sequences/GPU" if workload.phase == "decode" else "tokens/GPU"
    columns = (
        *("EP", "experts/GPU", batch, "tokens/s/GPU", "step ms"),
        *PARTS,
        *("max/mean", "largest", "batch limit"),
    )
    rows = tuple(_row(point, len(columns)) for point in points)
    return TextTable(title=f"{workload.phase}, as predicted", columns=columns, rows=rows)


def _row(point: SweepPoint, num_cells: int) -> tuple[str, ...]:
    """Cells of one EP size; where nothing runs, why."""
    operation, time = point.operation, point.operation.time
    size = (str(point.ep_size), str(point.deployment.experts_per_rank))
    if time is None:
        return (*size, *["-"] * (num_cells - 3), operation.limited_by)
    return (
        *size,
        f"{operation.batch:,}",
        f"{point.tokens_per_s:,.0f}",
        f"{1e3 * time.total:.1f}",
        *(f"{share:.0%}" for share in time.split.values()),
        f"{time.imbalance:.2f}",
        point.limiting_part,
        operation.limited_by,
    )


def _mending_table(points: Sequence[SweepPoint]) -> TextTable:
    """A row for each change, a column for each EP size."""
    gains = [{m.name: m.gain for m in p.mendings} for p in points]
    names = [name for name in MENDINGS if any(name in found for found in gains)]
    rows = [(name, *(f"x {found[name]:.2f}" if name in found else "-" for found in gains)) for name in names]
    best = (p.mendings[0].name if _helps(p) else "-" for p in points)
    return TextTable(
        title="What one change would gain in tokens/s/GPU",
        columns=("change", *(f"EP {p.ep_size}" for p in points)),
        rows=(*rows, ("best", *best)),
    )


def _helps(point: SweepPoint) -> bool:
    """Whether any change gains more than rounding shows."""
    return bool(point.mendings) and point.mendings[0].gain > 1.005
