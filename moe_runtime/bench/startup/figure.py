"""The figure of `bench startup`: a bar of phases for each kind of start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.startup.phases import PHASES


def plot_startup(results: Sequence[Mapping[str, Any]], mode: str, aim_s: float, prefix: str) -> list[Path]:
    """Draw the medians into PREFIX.png and PREFIX.svg; returns the files."""
    import matplotlib

    color_of = matplotlib.colormaps["tab20"]  # by number: a phase has the same one in every mode
    figure = new_figure(9.0, 1.6 + 0.7 * len(results))
    axes = figure.subplots()
    starts = [str(result["start"]) for result in results]
    left = [0.0] * len(results)
    for number, name in enumerate(PHASES):
        seconds = [result["phases_median_s"].get(name, 0.0) for result in results]
        if any(seconds):
            axes.barh(starts, seconds, left=left, label=name, color=color_of(number))
            left = [begin + length for begin, length in zip(left, seconds, strict=True)]
    axes.axvline(aim_s, color="black", linestyle="--", label="aim")
    axes.set(title=f"first token, {mode}", xlabel="seconds since the process was started")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return save_figure(figure, prefix)
