"""Validation: published figures beside what the frozen constants predict for them, with errors as they come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.simulate.published import FIGURES, TRENDS, PublishedFigure
from moe_runtime.simulate.step import step_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One published figure and its predictions, in tokens/s of a GPU."""

    figure: PublishedFigure
    predicted: float  # from the frozen constants alone
    calibrated: float  # after one factor on all times, chosen so that the calibrating figure is met

    @property
    def error(self) -> float:
        """Relative: 0.1 is a tenth too fast."""
        return self.predicted / self.figure.tokens_per_s - 1

    @property
    def calibrated_error(self) -> float:
        return self.calibrated / self.figure.tokens_per_s - 1

    def to_dict(self) -> dict[str, Any]:
        """For the JSON object."""
        f = self.figure
        return {
            "figure": f.name,
            "source": f.source,
            "gpu": f.gpu,
            "expert_parallel_size": f.expert_parallel_size,
            "published_tokens_per_s_per_gpu": round(f.tokens_per_s, 1),
            "predicted_tokens_per_s_per_gpu": round(self.predicted, 1),
            "error": round(self.error, 3),
            "calibrated_tokens_per_s_per_gpu": round(self.calibrated, 1),
            "calibrated_error": None if f.calibrates else round(self.calibrated_error, 3),
            "calibrates": f.calibrates,
            "assumptions": f.assumptions,
        }


def compare(figures: Sequence[PublishedFigure] = FIGURES) -> tuple[list[Comparison], float]:
    """Every figure with its predictions, and the calibrating factor (1 where no figure calibrates)."""
    calibrating = [f for f in figures if f.calibrates]
    assert len(calibrating) <= 1, "at most one published figure may calibrate"
    factor = _predict(calibrating[0]) / calibrating[0].tokens_per_s if calibrating else 1.0
    return [
        Comparison(figure=f, predicted=_predict(f), calibrated=_predict(f, factor)) for f in figures
    ], factor


def run_validation() -> Report:
    """The report of `simulate --validate`."""
    started_load = load_average()
    comparisons, factor = compare()
    return Report(
        benchmark="simulate-validate",
        device="none: computed",
        started_load=started_load,
        workload={"model": "deepseek-v3", "calibrating_factor": round(factor, 4)},
        results=[c.to_dict() for c in comparisons],
        tables=[_table(comparisons, factor), _trend_table(comparisons)],
    )


def assumptions(figures: Sequence[PublishedFigure] = FIGURES) -> list[str]:
    """A line for each figure: where it stands, and what is assumed."""
    return [f"{f.name} ({f.source}): {f.assumptions}." for f in figures]


def _predict(figure: PublishedFigure, time_factor: float = 1.0) -> float:
    return figure.step.tokens / step_time(figure.deployment(time_factor), figure.step).total


def _table(comparisons: Sequence[Comparison], factor: float) -> TextTable:
    rows = tuple(
        (
            c.figure.name,
            f"{c.figure.tokens_per_s:,.0f}",
            f"{c.predicted:,.0f}",
            f"{c.error:+.0%}",
            f"{c.calibrated:,.0f}",
            "calibrates" if c.figure.calibrates else f"{c.calibrated_error:+.0%}",
        )
        for c in comparisons
    )
    return TextTable(
        title=f"Tokens/s of a GPU: published and predicted; calibrated: all times x {factor:.3f}",
        columns=("figure", "published", "predicted", "error", "calibrated", "error"),
        rows=rows,
    )


def _trend_table(comparisons: Sequence[Comparison]) -> TextTable:
    by_name = {c.figure.name: c for c in comparisons}
    rows = []
    for what, over, under in TRENDS:
        a, b = by_name[over], by_name[under]
        published = a.figure.tokens_per_s / b.figure.tokens_per_s
        predicted = a.predicted / b.predicted
        rows.append((what, f"{published:.2f}", f"{predicted:.2f}", f"{predicted / published - 1:+.0%}"))
    return TextTable(
        title="Ratios of these figures, which no factor changes",
        columns=("ratio", "published", "predicted", "error"),
        rows=tuple(rows),
    )
