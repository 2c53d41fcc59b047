"""Timing GPU work without the host's part in it: calls are captured in a CUDA graph and replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all `calls`, one after the other; each has run once before, so that all is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def median_seconds(graphs: Mapping[str, torch.cuda.CUDAGraph], num_rounds: int) -> dict[str, float]:
    """Seconds of one replay of each: the median of `num_rounds` rounds, in which each has its turn."""
    rounds: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(num_rounds):
        for name, graph in graphs.items():
            rounds[name].append(_replay_seconds(graph))
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
