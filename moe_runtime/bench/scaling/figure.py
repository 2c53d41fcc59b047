"""The figure of `bench scaling`: a row for each mode and phase; throughput, efficiency, and the split of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.scaling.phases import PARTS

_ROW_INCHES = 3.2
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#88d27a", "#b279a2", "#9d9d9d", "#d8d8d8")  # of PARTS


def draw(results: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Write PREFIX.png and PREFIX.svg."""
    kinds = list(dict.fromkeys((result["mode"], result["phase"]) for result in results))
    figure = new_figure(13.0, _ROW_INCHES * len(kinds) + 0.6)
    axes = figure.subplots(len(kinds), 3, squeeze=False)
    for row, kind in zip(axes, kinds, strict=True):
        chosen = [result for result in results if (result["mode"], result["phase"]) == kind]
        scaled = [result for result in chosen if result["same_cores_as"] is None]
        alone = [result for result in chosen if result["same_cores_as"] is not None]
        _throughput(row[0], scaled, alone, f"{kind[0]} scaling, {kind[1]}")
        _efficiency(row[1], scaled)
        _split(row[2], scaled)
    handles, labels = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    save_figure(figure, prefix)


def _throughput(
    axes: Any, scaled: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]], title: str
) -> None:
    sizes = [result["expert_parallel_size"] for result in scaled]
    rates = [result["tokens_per_s"] for result in scaled]
    axes.plot(sizes, [rates[0] * n / sizes[0] for n in sizes], "--", color="0.6", label="perfect")
    axes.plot(sizes, rates, "o-", color=_COLOURS[0], label="measured")
    if alone:
        places = [result["same_cores_as"] for result in alone]
        same = [result["tokens_per_s"] for result in alone]
        axes.plot(places, same, "x", color=_COLOURS[1], label="one rank, same cores")
    axes.set(title=title, ylabel="tokens/s", xticks=sizes, xlabel="ranks")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _efficiency(axes: Any, scaled: Sequence[Mapping[str, Any]]) -> None:
    sizes = [result["expert_parallel_size"] for result in scaled]
    axes.axhline(100, linestyle="--", color="0.6")
    axes.plot(sizes, [100 * result["efficiency"] for result in scaled], "o-", color=_COLOURS[0])
    axes.set(title="efficiency", ylabel="% of perfect", xticks=sizes, xlabel="ranks")
    axes.set_ylim(bottom=0)


def _split(axes: Any, scaled: Sequence[Mapping[str, Any]]) -> None:
    """Ranks' time a token: perfect scaling keeps the height."""
    names = [str(result["expert_parallel_size"]) for result in scaled]
    below = [0.0] * len(scaled)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        heights = [result["expert_parallel_size"] * result["parts_us_of_token"][part] for result in scaled]
        axes.bar(names, heights, 0.6, bottom=below, color=colour, label=part)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    axes.axhline(below[0], linestyle="--", color="0.6")
    axes.set(title="time of all ranks a token, steps timed", ylabel="µs", xlabel="ranks")
