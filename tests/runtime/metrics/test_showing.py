"""The line in the log, and the mirror in Ray's own metrics."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from moe_runtime.metrics import deployment_metrics
from moe_runtime.metrics.activity_log import ActivityLog
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.metrics.ray_bridge import RayBridge
from moe_runtime.metrics.samples import RankSampler
from tests.runtime.metrics.fakes import FakeClock, FakeRanks, make_samples


def test_a_line_is_written_for_time_with_requests_and_none_when_idle() -> None:
    ranks, clock, lines = FakeRanks(), FakeClock(), []
    log = ActivityLog(RankSampler(ranks.stats, clock=clock).latest, clock, lines.append)
    ranks.loop[0]["generation_tokens"] = 1000
    log.begin()
    for _ in range(3):
        clock.now += 10
        log.look(active=False)
    assert lines == []

    ranks.loop[0] |= {"prompt_tokens": 250, "generation_tokens": 1100}
    ranks.scheduler[0] |= {"num_running": 3, "blocks_used": 4}
    ranks.scheduler[1] |= {"num_waiting": 2, "prefix_query_tokens": 400, "prefix_hit_tokens": 100}
    ranks.compute(0, 0, 30)
    ranks.compute(0, 2, 10)
    clock.now += 10
    log.look(active=True)
    clock.now += 10
    log.look(active=True)
    assert lines == [
        "prompt 25.0 tokens/s, generation 10.0 tokens/s, running 3, waiting 2, KV cache 20.0%, "
        "prefix hits 25.0%, balancedness 0.67",
        "prompt 0.0 tokens/s, generation 0.0 tokens/s, running 3, waiting 2, KV cache 20.0%, "
        "prefix hits none asked, balancedness no load",
    ]


def test_tokens_of_idle_time_are_not_of_the_next_line() -> None:
    ranks, clock, lines = FakeRanks(), FakeClock(), []
    log = ActivityLog(RankSampler(ranks.stats, clock=clock).latest, clock, lines.append)
    log.begin()
    for tokens, active in [(5000, False), (9000, False), (9100, True)]:  # at first another driver's
        ranks.loop[0]["generation_tokens"] = tokens
        clock.now += 10
        log.look(active)
    (line,) = lines
    assert "generation 10.0 tokens/s" in line


def test_nothing_is_written_while_the_ranks_do_not_answer() -> None:
    ranks, clock, lines = FakeRanks(), FakeClock(), []
    log = ActivityLog(RankSampler(ranks.stats, clock=clock).latest, clock, lines.append)
    log.begin()
    ranks.failure = TimeoutError("no answer")
    for _ in range(2):
        clock.now += 10
        log.look(active=True)
    ranks.failure = None
    clock.now += 10
    log.look(active=True)
    assert lines == []
    clock.now += 10
    log.look(active=True)
    assert len(lines) == 1


class _Mirror:
    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.calls: list[tuple[float, dict[str, str]]] = []
        _FakeRay.made[name] = self
        self.tag_keys = tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((value, dict(tags)))

    inc = set


class _FakeRay:
    made: ClassVar[dict[str, _Mirror]] = {}
    Gauge = Counter = _Mirror


def test_ray_gets_values_of_gauges_and_growth_of_counters_and_histograms() -> None:
    _FakeRay.made = {}
    value = {"gauge": 1.0, "counter": 5.0, "count": 2, "seconds": 0.5}

    def collect() -> list[Any]:
        gauge = GaugeMetricFamily("moe_runtime:g", "a gauge", labels=["rank"])
        gauge.add_metric(["0"], value["gauge"])
        counter = CounterMetricFamily("moe_runtime:c", "a counter", labels=["rank"])
        counter.add_metric(["0"], value["counter"])
        histogram = HistogramMetricFamily("moe_runtime:h_seconds", "a histogram", labels=["rank"])
        histogram.add_metric(["0"], [("1", 1), ("+Inf", value["count"])], value["seconds"])
        return [gauge, counter, histogram]

    bridge = RayBridge(collect, _FakeRay)
    bridge.push()
    value |= {"gauge": 0.0, "counter": 7.5, "count": 3, "seconds": 2.0}
    bridge.push()
    bridge.push()
    value["counter"] = 1.0  # began anew
    bridge.push()

    of_histogram = {"moe_runtime_h_seconds_count", "moe_runtime_h_seconds_sum"}
    assert set(_FakeRay.made) == {"moe_runtime_g", "moe_runtime_c"} | of_histogram
    gauge, counter = _FakeRay.made["moe_runtime_g"], _FakeRay.made["moe_runtime_c"]
    assert gauge.tag_keys == ("rank",)
    assert [v for v, _ in gauge.calls] == [1.0, 0.0, 0.0, 0.0]
    assert counter.calls == [(5.0, {"rank": "0"}), (2.5, {"rank": "0"}), (1.0, {"rank": "0"})]
    assert _FakeRay.made["moe_runtime_h_seconds_count"].calls == [(2.0, {"rank": "0"}), (1.0, {"rank": "0"})]
    assert _FakeRay.made["moe_runtime_h_seconds_sum"].calls == [(0.5, {"rank": "0"}), (1.5, {"rank": "0"})]


def test_the_thread_shows_what_is_in_flight_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, clock, pushed = FakeRanks(), FakeClock(), threading.Semaphore(0)

    class Bridge:
        def __init__(self, collect: object) -> None:
            pass

        def push(self) -> None:
            pushed.release()
            raise RuntimeError("Ray is gone")  # it is tried again all the same

    monkeypatch.setattr(deployment_metrics, "RayBridge", Bridge)
    metrics = DeploymentMetrics(ranks.stats, model_name="m", clock=clock)
    metrics.observer.on_arrival(make_samples("a", clock))
    metrics.start(to_ray=True, interval_s=0.01)
    (thread,) = [t for t in threading.enumerate() if t.name == "metrics"]
    assert pushed.acquire(timeout=30)
    assert pushed.acquire(timeout=30)
    metrics.close()
    thread.join(30)
    assert not thread.is_alive()
