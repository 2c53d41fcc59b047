"""What is exported of the ranks, how often they are asked, and what is left when they do not answer."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_runtime.errors import RankFailedError
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from tests.runtime.metrics.fakes import FakeClock, FakeRanks, make_report


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def ranks() -> FakeRanks:
    return FakeRanks()


def _metrics(ranks: FakeRanks, clock: FakeClock, **options: object) -> DeploymentMetrics:
    return DeploymentMetrics(
        ranks.stats,
        model_name="m",
        deployment_info={"version": "1"},
        reports=[make_report(0), make_report(1)],
        clock=clock,
        **options,  # type: ignore[arg-type]
    )


def _series(metrics: DeploymentMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Of each series of the ranks: its values by the labels, in order of their names, without model_name."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            name = sample.name.removeprefix("moe_runtime:")
            found.setdefault(name, {})[tuple(labels[key] for key in sorted(labels))] = sample.value
    return found


def test_counters_and_gauges_come_from_the_rank_that_has_them(ranks: FakeRanks, clock: FakeClock) -> None:
    ranks.scheduler[0] |= {"num_running": 2, "blocks_used": 5, "slots_used": 1, "prefix_query_tokens": 9}
    ranks.scheduler[1] |= {"num_waiting": 3, "preemptions": 4, "prefix_hit_tokens": 6}
    ranks.loop[0] |= {"prompt_tokens": 70, "generation_tokens": 8, "step_tokens": 77}
    ranks.step_parts[1]["experts"] = 1.5
    ranks.step_sizes[0] = [3, 1, 0, 2]
    found = _series(_metrics(ranks, clock))

    assert found["num_requests_running"] == {("0",): 2, ("1",): 0}
    assert found["num_requests_waiting"] == {("0",): 0, ("1",): 3}
    assert found["kv_cache_usage_perc"] == {("0",): 0.5, ("1",): 0}
    assert found["state_slot_usage_perc"] == {("0",): 0.25, ("1",): 0}
    assert found["prefix_cache_queries_total"] == {("0",): 9, ("1",): 0}
    assert found["prefix_cache_hits_total"] == {("0",): 0, ("1",): 6}
    assert found["num_preemptions_total"] == {("0",): 0, ("1",): 4}
    assert found["prompt_tokens_total"] == {("0",): 70, ("1",): 0}
    assert found["generation_tokens_total"] == {("0",): 8, ("1",): 0}
    assert found["step_time_seconds_total"]["experts", "1"] == 1.5
    assert len(found["step_time_seconds_total"]) == 14
    assert found["iteration_tokens_total_sum"]["0",] == 77
    assert found["iteration_tokens_total_count"]["0",] == 6
    buckets = found["iteration_tokens_total_bucket"]
    assert [buckets[le, "0"] for le in ("1.0", "2.0", "4.0", "+Inf")] == [3, 4, 4, 6]
    assert found["deployment_info"] == {("1",): 1}
    assert set(found["rank_info"]) == {("a CPU", "shared_memory", "10.0.0.1", r) for r in "01"}


@pytest.mark.parametrize("per_expert", [False, True])
def test_expert_tokens_are_by_rank_and_layer_or_by_expert_as_well(
    ranks: FakeRanks, clock: FakeClock, per_expert: bool
) -> None:
    for layer, expert, tokens in ((0, 0, 5), (0, 1, 1), (0, 2, 2), (1, 3, 7)):
        ranks.compute(layer, expert, tokens)
    found = _series(_metrics(ranks, clock, per_expert=per_expert))["expert_tokens_total"]
    if per_expert:
        assert {k: v for k, v in found.items() if v} == {
            ("0", "0", "0"): 5,
            ("1", "0", "0"): 1,
            ("2", "0", "1"): 2,
            ("3", "2", "1"): 7,
        }
    else:
        assert found == {("0", "0"): 6, ("2", "0"): 0, ("0", "1"): 2, ("2", "1"): 7}


def test_balancedness_is_of_the_last_seconds_and_of_layers_with_load(
    ranks: FakeRanks, clock: FakeClock
) -> None:
    metrics = _metrics(ranks, clock)
    ranks.compute(1, 0, 1000)  # before the first sample
    assert "balancedness" not in _series(metrics)
    clock.now += 5
    for expert, tokens in enumerate((3, 1, 2, 2)):
        ranks.compute(0, expert, tokens)
    assert _series(metrics)["balancedness"] == {
        ("0", "rank"): 1.0,
        ("0", "expert"): pytest.approx(2 / 3),
    }


def test_the_ranks_are_asked_once_a_second_whoever_wants_to_know(ranks: FakeRanks, clock: FakeClock) -> None:
    metrics = _metrics(ranks, clock)
    for _ in range(3):
        metrics.render()
        metrics.load_snapshot()
        clock.now += 0.3
    assert ranks.num_asked == 1
    clock.now += 0.2
    metrics.render()
    assert ranks.num_asked == 2


@pytest.mark.parametrize("failure", [RankFailedError("rank 1 is gone"), KeyError("rank")])
def test_ranks_that_do_not_answer_leave_what_is_known_without_them(
    ranks: FakeRanks, clock: FakeClock, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = _metrics(ranks, clock)
    assert _series(metrics)["num_ranks_answering"] == {(): 2}
    ranks.failure = failure
    for _ in range(2):
        clock.now += 1
        found = _series(metrics)
        assert found["num_ranks_answering"] == {(): 0}
        assert "num_requests_running" not in found
        assert "deployment_info" in found
    assert len(caplog.records) == 1  # not one for each scrape
    assert metrics.load_snapshot()["ranks_answer"] is False


def test_several_deployments_live_in_one_process(ranks: FakeRanks, clock: FakeClock) -> None:
    first, second = _metrics(ranks, clock), _metrics(FakeRanks(), clock)
    ranks.scheduler[0]["num_running"] = 1
    assert _series(first)["num_requests_running"] != _series(second)["num_requests_running"]


def test_the_format_is_the_one_that_was_asked_for(ranks: FakeRanks, clock: FakeClock) -> None:
    metrics = _metrics(ranks, clock)
    _, plain = metrics.render()
    body, openmetrics = metrics.render("application/openmetrics-text; version=1.0.0")
    assert plain.startswith("text/plain")
    assert openmetrics.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
