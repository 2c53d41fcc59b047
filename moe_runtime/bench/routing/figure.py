"""The figure of `bench routing`: the load of every expert of every layer, and what it means for ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.routing.statistics import load_of_experts
from moe_runtime.experts.trace import RoutingTrace

_MOST_RELATIVE_LOAD = 4.0  # darker than that nothing gets, so that one busy expert does not hide all others


def draw(trace: RoutingTrace, results: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Write PREFIX.png and PREFIX.svg.

    Args:
        results: of the trace's report.
    """
    load_ME = load_of_experts(trace)
    figure = new_figure(12.0, max(4.0, 0.12 * len(load_ME) + 2.0))
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    image = left.imshow(
        load_ME / np.maximum(load_ME.mean(1, keepdims=True), 1e-9),
        aspect="auto",
        cmap="magma_r",
        vmin=0,
        vmax=_MOST_RELATIVE_LOAD,
        interpolation="nearest",
    )
    left.set(title=f"load of each expert, {trace.num_tokens:,} tokens", xlabel="expert", ylabel="layer")
    ticks = range(0, len(trace.layers), max(1, len(trace.layers) // 12))
    left.set_yticks(list(ticks), [str(trace.layers[tick]) for tick in ticks])
    figure.colorbar(image, ax=left, label="times the mean", extend="max")
    for size in results[0]["balancedness"]:
        right.plot(
            [result["balancedness"][size] for result in results],
            range(len(results)),
            "o-",
            label=f"EP={size}",
        )
    right.set(title="balancedness of ranks", xlabel="mean / max", xlim=(0, 1.02))
    right.set_yticks(list(ticks), [str(trace.layers[tick]) for tick in ticks])
    right.invert_yaxis()
    if results[0]["balancedness"]:
        right.legend(frameon=False)
    save_figure(figure, prefix)
