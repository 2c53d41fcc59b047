"""The figure of `bench serve`: latencies as cumulative shares, load and throughput over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.serving.answer import RequestRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_BINS = 40


def plot_run(records: Sequence[RequestRecord], duration_s: float, title: str, prefix: str) -> list[Path]:
    """Draw the requests that succeeded into PREFIX.png and PREFIX.svg; returns the files."""
    good = [record for record in records if record.error is None]
    figure = new_figure(11.0, 4.5)
    figure.suptitle(title)
    latencies, load = figure.subplots(1, 2)
    _draw_latencies(latencies, good)
    _draw_load(load, good, duration_s)
    return save_figure(figure, prefix)


def _draw_latencies(axes: Axes, records: Sequence[RequestRecord]) -> None:
    samples = {
        "TTFT": [record.ttft_s for record in records],
        "TPOT": [tpot for record in records if (tpot := record.tpot_s) is not None],
        "ITL": [gap for record in records for gap in record.itls_s],
        "E2EL": [record.e2el_s for record in records],
    }
    for name, seconds in samples.items():
        # Two tokens in one packet have no gap, and a logarithmic axis no place for it.
        ordered = sorted(value * 1e3 for value in seconds if value > 0)
        if ordered:
            axes.ecdf(ordered, label=name)
            axes.set_xscale("log")
    axes.set(xlabel="latency (ms)", ylabel="share of samples", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if records:
        axes.legend()


def _draw_load(axes: Axes, records: Sequence[RequestRecord], duration_s: float) -> None:
    width_s = max(duration_s, 1e-9) / _NUM_BINS
    tokens, in_flight = [0.0] * _NUM_BINS, [0] * _NUM_BINS
    for record in records:
        weight = record.output_tokens / len(record.chunk_times_s)
        for time_s in record.chunk_times_s:
            tokens[min(int(time_s / width_s), _NUM_BINS - 1)] += weight
        first, last = (min(int(t / width_s), _NUM_BINS - 1) for t in (record.sent_s, record.ended_s))
        for number in range(first, last + 1):
            in_flight[number] += 1
    middles = [(number + 0.5) * width_s for number in range(_NUM_BINS)]
    axes.plot(middles, [count / width_s for count in tokens], color="tab:blue")
    axes.set(xlabel="time (s)", ylim=(0, None))
    axes.set_ylabel("output tokens a second", color="tab:blue")
    other = axes.twinx()
    other.step(middles, in_flight, where="mid", color="tab:orange")
    other.set_ylim(0, None)
    other.set_ylabel("requests in flight", color="tab:orange")
    axes.grid(alpha=0.3)
