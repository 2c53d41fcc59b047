"""LoadHistory: how the load of the experts moved over the last seconds.

Shape legend: M MoE layers, E logical experts, W ranks.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moe_runtime.metrics.balance import (
    balancedness,
    overall_balancedness,
    tokens_per_expert,
    tokens_per_rank,
)
from moe_runtime.metrics.samples import Sample
from moe_runtime.rank_spec import RankStats

WINDOW_S = 30.0
SHOWN_S = 10.0  # of a snapshot, where samples are that close


@dataclass(frozen=True, slots=True)
class _Point:
    """A sample's counters as arrays."""

    at: float
    experts_ME: np.ndarray
    ranks_MW: np.ndarray
    prompt_tokens: float
    generation_tokens: float
    step_parts: tuple[dict[str, float], ...]  # of each rank

    @classmethod
    def of(cls, sample: Sample) -> _Point:
        return cls(
            sample.at,
            tokens_per_expert(sample.ranks),
            tokens_per_rank(sample.ranks),
            sample.total("prompt_tokens"),
            sample.total("generation_tokens"),
            tuple(rank.step_parts for rank in sample.ranks),
        )


@dataclass(frozen=True, slots=True)
class WindowLoad:
    """What was computed between two samples."""

    seconds: float
    experts_ME: np.ndarray  # choices of each logical expert
    ranks_MW: np.ndarray  # choices of experts of each rank
    prompt_tokens: float
    generation_tokens: float
    step_parts: tuple[dict[str, float], ...]  # seconds by part, of each rank

    @classmethod
    def between(cls, first: _Point, last: _Point) -> WindowLoad:
        return cls(
            last.at - first.at,
            last.experts_ME - first.experts_ME,
            last.ranks_MW - first.ranks_MW,
            last.prompt_tokens - first.prompt_tokens,
            last.generation_tokens - first.generation_tokens,
            tuple(
                {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}
                for before, after in zip(first.step_parts, last.step_parts, strict=True)
            ),
        )

    def rates(self) -> dict[str, float]:
        """Tokens a second; 0 for a window of no length."""
        seconds = self.seconds or 1.0
        return {
            "prompt_tokens_per_second": round(self.prompt_tokens / seconds, 3),
            "generation_tokens_per_second": round(self.generation_tokens / seconds, 3),
        }


class LoadHistory:
    """A ring of samples, as far back as the window goes. From any thread."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        """
        Args:
            window_s: seconds; one sample older than that is kept, so that the window is covered.
        """
        self._window_s = window_s
        self._lock = threading.Lock()
        self._points: deque[_Point] = deque()
        self._last: tuple[RankStats, ...] = ()

    def add(self, sample: Sample) -> None:
        """Take the next sample. Where counters fell or experts moved, history begins anew."""
        point = _Point.of(sample)
        with self._lock:
            if self._points and not self._goes_on(sample, point):
                self._points.clear()
            self._points.append(point)
            self._last = sample.ranks
            while len(self._points) > 2 and self._points[1].at <= point.at - self._window_s:
                self._points.popleft()

    def load(self) -> WindowLoad | None:
        """What was computed within the window, or since the sample before it; None before the second one."""
        with self._lock:
            points = self._points
            return WindowLoad.between(points[0], points[-1]) if len(points) > 1 else None

    def snapshot(self) -> dict[str, Any]:
        """The last SHOWN_S as plain values that JSON knows; docs/metrics.md lists the keys.

        Nothing that is older than the window is in it: where nobody asked for so long, it begins anew.
        """
        with self._lock:
            points, ranks = self._shown(), self._last
        load = WindowLoad.between(points[0], points[-1]) if len(points) > 1 else _empty(ranks)
        of_rank = load.ranks_MW.sum(0)
        total = int(of_rank.sum())
        shares = [round(int(tokens) / total, 4) if total else 0.0 for tokens in of_rank]
        return {
            "window_seconds": round(load.seconds, 3),
            "layers": list(ranks[0].moe_layers) if ranks else [],
            "rank_of_expert": _rank_of_expert(ranks, load.experts_ME.shape[1]),
            "tokens": load.experts_ME.tolist(),
            "rank_tokens": load.ranks_MW.tolist(),
            "balancedness": {
                "rank": _rounded(balancedness(load.ranks_MW)),
                "expert": _rounded(balancedness(load.experts_ME)),
                "overall": overall_balancedness(load.ranks_MW),
            },
            "throughput": load.rates(),
            "series": [
                {
                    "seconds_ago": round(points[-1].at - after.at, 3),
                    **WindowLoad.between(before, after).rates(),
                }
                for before, after in pairwise(points)
            ],
            "ranks": [_describe_rank(*each) for each in zip(ranks, shares, load.step_parts, strict=True)],
        }

    def _shown(self) -> list[_Point]:
        if not self._points:
            return []
        now = self._points[-1].at
        points = [point for point in self._points if point.at >= now - self._window_s]
        old = [index for index, point in enumerate(points) if point.at <= now - SHOWN_S]
        return points[old[-1] if old else 0 :]

    def _goes_on(self, sample: Sample, point: _Point) -> bool:
        before = self._points[-1]
        held = [(rank.moe_layers, rank.local_experts) for rank in self._last]
        return (
            [(rank.moe_layers, rank.local_experts) for rank in sample.ranks] == held
            and bool((point.experts_ME >= before.experts_ME).all())
            and point.generation_tokens >= before.generation_tokens
            and point.at > before.at
        )


def _empty(ranks: tuple[RankStats, ...]) -> WindowLoad:
    experts_ME = tokens_per_expert(ranks)
    zeros_MW = np.zeros((len(experts_ME), len(ranks)), dtype=np.int64)
    return WindowLoad(0.0, np.zeros_like(experts_ME), zeros_MW, 0.0, 0.0, ({},) * len(ranks))


def _rank_of_expert(ranks: tuple[RankStats, ...], num_experts: int) -> list[int]:
    rank_of = [-1] * num_experts
    for rank in ranks:
        for expert in rank.local_experts:
            rank_of[expert] = rank.rank
    return rank_of


def _describe_rank(rank: RankStats, share: float, parts: dict[str, float]) -> dict[str, Any]:
    scheduler = rank.scheduler
    return {
        "rank": rank.rank,
        "share": share,
        "running": scheduler["num_running"],
        "waiting": scheduler["num_waiting"],
        "kv_cache_usage": round(scheduler["blocks_used"] / max(1, scheduler["blocks_total"]), 4),
        "step_seconds": {part: round(seconds, 6) for part, seconds in parts.items()},
    }


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
