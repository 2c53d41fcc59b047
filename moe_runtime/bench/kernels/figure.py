"""The figure of `bench kernels`: each kernel's share of the limit that bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.bench.plots import new_figure, save_figure

_COLOURS = {"read bandwidth": "#4c78a8", "sgemm": "#f58518", "roofline": "#4c78a8"}  # by what the limit is


def draw(results: Sequence[Mapping[str, Any]], device: str, prefix: str) -> None:
    """A bar for each row of ours whose share is known, into PREFIX.png and PREFIX.svg.

    Args:
        results: of the report of a CPU or a GPU, which a saved JSON object holds as well.
    """
    # A GPU's report also has rows of what ours is compared with; on an unknown GPU nothing has a share.
    rows = [
        r
        for r in results
        if r.get("implementation", "moe_runtime") == "moe_runtime" and r["share"] is not None
    ]
    figure = new_figure(9.0, 1.6 + 0.25 * len(rows))
    axes = figure.subplots()
    for limit in dict.fromkeys(row.get("limit", "roofline") for row in rows):
        chosen = [row for row in rows if row.get("limit", "roofline") == limit]
        places = [rows.index(row) for row in chosen]
        axes.barh(places, [100 * row["share"] for row in chosen], color=_COLOURS[limit], label=limit)
    axes.set_yticks(range(len(rows)), [row["kernel"] for row in rows], fontsize="small")
    axes.axvline(100, linestyle="--", color="0.4")
    axes.set(title=device if rows else f"{device}: its limits are not known", xlabel="% of the limit")
    axes.title.set_fontsize("small")
    axes.invert_yaxis()
    if rows:
        axes.legend(frameon=False)
    save_figure(figure, prefix)
