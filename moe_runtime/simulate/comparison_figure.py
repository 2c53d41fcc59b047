"""The figures of comparisons: bars of what was published or measured, and of what is predicted for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.bench.plots import new_figure, save_figure

_COLOURS = ("#bbbbbb", "#4477aa", "#66ccee")  # Tol's bright scheme; grey is what others found
_BAR_HEIGHT = 0.8  # of all bars of one row; the rest is space between rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """One set of axes: a row for each label, a bar in it for each series."""

    title: str
    unit: str
    digits: int  # of a value, behind the point
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]  # values in the order of the labels


def draw_validation(results: Sequence[Mapping[str, Any]], prefix: str) -> list[Path]:
    """Write PREFIX.png and PREFIX.svg of the results of `run_validation`."""
    panel = _Panel(
        title="DeepSeek-V3/R1 in fp8: published and predicted",
        unit="tokens/s of a GPU",
        digits=0,
        labels=[r["figure"] for r in results],
        series={
            name: [r[f"{name}_tokens_per_s_per_gpu"] for r in results]
            for name in ("published", "predicted", "calibrated")
        },
    )
    return _draw([panel], prefix)


def draw_measured(results: Sequence[Mapping[str, Any]], prefix: str) -> list[Path]:
    """Write PREFIX.png and PREFIX.svg of the results of `run_measured`: a panel for each phase, and one of ratios."""
    points = [r for r in results if "error" in r]
    panels = []
    for phase in dict.fromkeys(r["phase"] for r in points):
        chosen = [r for r in points if r["phase"] == phase]
        panels.append(
            _Panel(
                title=f"{phase}: measured and predicted",
                unit="tokens/s of the deployment",
                digits=1,
                labels=[_label(r) for r in chosen],
                series={
                    name: [r[f"{name}_tokens_per_s"] for r in chosen] for name in ("measured", "predicted")
                },
            )
        )
    ratios = [r for r in results if "ratio" in r]
    if ratios:
        panels.append(
            _Panel(
                title="Scaling: measured and predicted",
                unit="ratio of tokens/s",
                digits=2,
                labels=[f"{r['ratio']}, {r['mode']}, {r['phase']}, {r['requests']} requests" for r in ratios],
                series={name: [r[name] for r in ratios] for name in ("measured", "predicted")},
            )
        )
    return _draw(panels, prefix)


def _label(result: Mapping[str, Any]) -> str:
    threads = result["threads_per_rank"]
    of_rank = f"{threads} thread{'s'[: threads > 1]} a rank"
    return f"{result['model']}, EP{result['expert_parallel_size']}, {of_rank}, {result['requests']} requests"


def _draw(panels: Sequence[_Panel], prefix: str) -> list[Path]:
    rows = [len(panel.labels) for panel in panels]
    figure = new_figure(width=10.0, height=sum(0.9 + 0.4 * n for n in rows))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _bars(axes, panel)
    return save_figure(figure, prefix)


def _bars(axes: Any, panel: _Panel) -> None:
    height = _BAR_HEIGHT / len(panel.series)
    for index, ((name, values), colour) in enumerate(zip(panel.series.items(), _COLOURS, strict=False)):
        places = [row + (index - (len(panel.series) - 1) / 2) * height for row in range(len(values))]
        bars = axes.barh(places, values, height, color=colour, label=name)
        axes.bar_label(bars, fmt=f"{{:,.{panel.digits}f}}", fontsize=7, padding=2)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=8)
    axes.invert_yaxis()  # the first on top, as in the table
    axes.margins(x=0.1)
    axes.set_xlabel(panel.unit, fontsize=8)
    axes.set_title(panel.title, fontsize=10)
    axes.legend(fontsize=8)
