"""The figure of a sweep: throughput beside perfect scaling, the parts of a step, and what changes would gain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.simulate.mending import MENDINGS
from moe_runtime.simulate.step import PARTS
from moe_runtime.simulate.sweep import BREAK_BELOW, SweepPoint, breaks_at, verdict

_COLOURS = ("#4477aa", "#66ccee", "#ee6677", "#aa3377", "#ccbb44", "#bbbbbb")  # Tol's bright scheme


def draw(points: Sequence[SweepPoint], title: str, prefix: str) -> list[Path]:
    """Write PREFIX.png and PREFIX.svg; EP sizes at which nothing runs are crosses at 0 tokens/s."""
    running = [p for p in points if p.operation.time]
    figure = new_figure(width=10.0, height=4.2)
    throughput, split, gains = figure.subplots(1, 3)
    if running:
        _throughput(throughput, points, running)
        _split(split, running)
        _gains(gains, running)
    figure.suptitle(f"{title}\n{verdict(points)}", fontsize=9)
    return save_figure(figure, prefix)


def _throughput(axes: Any, points: Sequence[SweepPoint], running: Sequence[SweepPoint]) -> None:
    best = max(p.tokens_per_s for p in running)
    rates = [p.tokens_per_s for p in running]
    axes.plot([p.ep_size for p in running], rates, "o-", color=_COLOURS[0], label="predicted")
    axes.axhline(best, linestyle="--", color="grey", label="best of all")
    broken = breaks_at(points)
    if broken is not None:
        axes.axvline(broken.ep_size, color=_COLOURS[2], label=f"below {BREAK_BELOW:.0%} of the best before")
    stopped = [p.ep_size for p in points if not p.operation.time]
    if stopped:
        label = "does not run: see the table's limit"
        axes.plot(stopped, [0] * len(stopped), "x", color=_COLOURS[3], label=label, clip_on=False)
    _sizes_axis(axes, [p.ep_size for p in points])
    axes.set_ylim(bottom=0)
    _describe(axes, "Throughput", "tokens/s of a GPU", columns=1)


def _split(axes: Any, points: Sequence[SweepPoint]) -> None:
    places = range(len(points))
    below = [0.0] * len(points)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        heights = [1e3 * getattr(p.operation.time, part) for p in points]
        axes.bar(places, heights, bottom=below, label=part, color=colour)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set_xticks(list(places), [str(p.ep_size) for p in points])
    _describe(axes, "Where a step's time goes", "ms of a step", columns=3)


def _gains(axes: Any, points: Sequence[SweepPoint]) -> None:
    sizes = [p.ep_size for p in points]
    for name in MENDINGS:
        gains = [next((m.gain for m in p.mendings if m.name == name), None) for p in points]
        if any(gain is not None for gain in gains):
            axes.plot(sizes, [float("nan") if g is None else g for g in gains], "o-", label=name)
    _sizes_axis(axes, sizes)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    _describe(axes, "What one change would gain", "times as many tokens/s", columns=2)


def _sizes_axis(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])


def _describe(axes: Any, title: str, unit: str, columns: int) -> None:
    """Texts; the legend, of so many columns, stands below, where it covers nothing."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("expert parallel size", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False)
