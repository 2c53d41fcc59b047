"""Balancedness, and the snapshot behind the heat map of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_runtime.metrics.balance import balancedness, overall_balancedness
from moe_runtime.metrics.history import LoadHistory
from moe_runtime.metrics.samples import Sample
from tests.runtime.metrics.fakes import FakeRanks


@pytest.mark.parametrize(
    ("load", "each", "overall"),
    [
        ([[4, 4]], [1.0], 1.0),
        ([[8, 0]], [0.5], 0.5),
        ([[8, 0], [1, 1]], [0.5, 1.0], 5 / 9),
        ([[0, 0], [3, 1]], [None, 2 / 3], 2 / 3),
        ([[0, 0]], [None], None),
    ],
)
def test_balancedness_is_mean_over_max(
    load: list[list[int]], each: list[float | None], overall: float | None
) -> None:
    found = [None if np.isnan(v) else v for v in balancedness(np.array(load))]
    assert found == pytest.approx(each)
    assert overall_balancedness(np.array(load)) == pytest.approx(overall)


class _Watched:
    """A history that samples fake ranks at the times that a test gives."""

    def __init__(self, window_s: float = 30.0) -> None:
        self.ranks = FakeRanks()
        self.history = LoadHistory(window_s)

    def sample(self, at: float) -> None:
        self.history.add(Sample(at, tuple(self.ranks.stats())))


def test_a_snapshot_shows_the_window_alone_and_json_knows_it() -> None:
    watched = _Watched()
    ranks = watched.ranks
    ranks.compute(0, 3, 100)
    watched.sample(10.0)
    ranks.compute(0, 0, 6)
    ranks.compute(1, 2, 2)
    ranks.loop[0]["generation_tokens"] = 20
    ranks.loop[1]["prompt_tokens"] = 50
    ranks.step_parts[1]["experts"] = 0.5
    ranks.scheduler[1] |= {"num_running": 4, "num_waiting": 1, "blocks_used": 5}
    watched.sample(14.0)

    shot = json.loads(json.dumps(watched.history.snapshot()))
    others = {"attention", "linear_attention", "dispatch", "combine", "waiting", "other"}
    assert shot == {
        "window_seconds": 4.0,
        "layers": [0, 2],
        "rank_of_expert": [0, 0, 1, 1],
        "tokens": [[6, 0, 0, 0], [0, 0, 2, 0]],
        "rank_tokens": [[6, 0], [0, 2]],
        "balancedness": {"rank": [0.5, 0.5], "expert": [0.25, 0.25], "overall": 0.5},
        "throughput": {"prompt_tokens_per_second": 12.5, "generation_tokens_per_second": 5.0},
        "series": [
            {"seconds_ago": 0.0, "prompt_tokens_per_second": 12.5, "generation_tokens_per_second": 5.0}
        ],
        "ranks": [
            {
                "rank": 0,
                "share": 0.75,
                "running": 0,
                "waiting": 0,
                "kv_cache_usage": 0.0,
                "step_seconds": {"experts": 0.0} | dict.fromkeys(others, 0.0),
            },
            {
                "rank": 1,
                "share": 0.25,
                "running": 4,
                "waiting": 1,
                "kv_cache_usage": 0.5,
                "step_seconds": {"experts": 0.5} | dict.fromkeys(others, 0.0),
            },
        ],
    }


def test_the_window_moves_on_and_keeps_one_sample_before_it() -> None:
    watched = _Watched(window_s=10.0)
    for at in range(0, 41, 4):
        watched.ranks.compute(0, 0, 1)
        watched.sample(float(at))
    load = watched.history.load()
    assert load is not None
    assert load.seconds == 12.0
    assert load.experts_ME[0, 0] == 3


@pytest.mark.parametrize(
    ("every", "window", "num_pairs"),
    [
        (1.0, 10.0, 10),  # the page's
        (3.0, 12.0, 4),
        (20.0, 20.0, 1),
        (30.0, 30.0, 1),
        (31.0, 0.0, 0),  # nothing that old is shown
    ],
)
def test_a_snapshot_shows_ten_seconds_or_since_the_sample_before(
    every: float, window: float, num_pairs: int
) -> None:
    watched = _Watched()
    for number in range(60):
        watched.ranks.compute(0, 0, 1)
        watched.sample(number * every)
    shot = watched.history.snapshot()
    assert (shot["window_seconds"], len(shot["series"])) == (window, num_pairs)
    assert shot["tokens"][0][0] == num_pairs
    load = watched.history.load()
    assert load is not None
    assert load.seconds >= 30.0  # what Prometheus reads is for those that scrape seldom, too


def test_after_a_pause_a_snapshot_begins_anew_and_grows() -> None:
    watched = _Watched()
    for at in (0.0, 1.0, 2.0, 600.0):
        watched.ranks.compute(0, 0, 100)
        watched.sample(at)
    shot = watched.history.snapshot()
    assert (shot["window_seconds"], shot["tokens"], shot["series"]) == (0.0, [[0] * 4] * 2, [])
    assert shot["ranks"][0]["running"] == 0
    windows = []
    for at in range(601, 615):
        watched.ranks.compute(0, 1, 1)
        watched.sample(float(at))
        shot = watched.history.snapshot()
        windows.append(shot["window_seconds"])
        assert shot["tokens"] == [[0, shot["window_seconds"], 0, 0], [0] * 4]
    assert windows == [*range(1, 10), 10, 10, 10, 10, 10]


def test_counters_that_fall_begin_history_anew() -> None:
    watched = _Watched()
    watched.ranks.compute(0, 0, 50)
    watched.sample(0.0)
    watched.ranks = FakeRanks()
    watched.sample(1.0)
    assert watched.history.load() is None
    watched.ranks.compute(0, 0, 2)
    watched.sample(2.0)
    load = watched.history.load()
    assert load is not None
    assert load.experts_ME[0].tolist() == [2, 0, 0, 0]


def test_before_the_second_sample_there_is_no_load() -> None:
    watched = _Watched()
    assert watched.history.snapshot()["tokens"] == []
    watched.ranks.compute(0, 0, 5)
    watched.sample(0.0)
    shot = watched.history.snapshot()
    assert (shot["window_seconds"], shot["tokens"]) == (0.0, [[0] * 4] * 2)
    assert shot["balancedness"] == {"rank": [None] * 2, "expert": [None] * 2, "overall": None}
