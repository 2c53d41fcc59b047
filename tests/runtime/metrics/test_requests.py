"""RequestRecorder: which latency is observed when, against a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_runtime.metrics.requests import FINISH_REASONS, RequestRecorder
from moe_runtime.observer import RequestObserver
from moe_runtime.request import OutputDelta
from tests.runtime.metrics.fakes import FakeClock, make_samples


def _values(recorder: RequestRecorder) -> dict[str, float]:
    """Sums and counts of every series that is not 0, without the prefix; counters by their reason."""
    found = {}
    for family in recorder.collect():
        for sample in family.samples:
            name = sample.name.removeprefix("moe_runtime:")
            if name.endswith(("_sum", "_count", "_total")) and sample.value:
                found[f"{name}{sample.labels.get('finished_reason', '')}"] = sample.value
    return found


def _delta(name: str, *tokens: int, sample: int = 0, **rest: object) -> OutputDelta:
    return OutputDelta(request_id=name, sample_index=sample, new_token_ids=tokens, **rest)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def recorder(clock: FakeClock) -> RequestRecorder:
    return RequestRecorder("m", clock)


def test_a_request_is_divided_into_queue_prefill_and_decode(
    recorder: RequestRecorder, clock: FakeClock
) -> None:
    observer: RequestObserver = recorder
    observer.on_arrival(make_samples("a", clock, prompt=5))
    clock.now += 3.0
    observer.on_deltas([_delta("a", 7, time_in_queue=1.0)])
    clock.now += 0.5
    observer.on_deltas([_delta("a", 8)])
    clock.now += 1.5
    observer.on_deltas([_delta("a", 9, 10, finish_reason="length")])

    assert _values(recorder) == {
        "time_to_first_token_seconds_sum": 3.0,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_sum": 2.0,
        "inter_token_latency_seconds_count": 2,
        "request_time_per_output_token_seconds_sum": pytest.approx(2.0 / 3),
        "request_time_per_output_token_seconds_count": 1,
        "e2e_request_latency_seconds_sum": 5.0,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_sum": 1.0,
        "request_queue_time_seconds_count": 1,
        "request_prefill_time_seconds_sum": 2.0,
        "request_prefill_time_seconds_count": 1,
        "request_decode_time_seconds_sum": 2.0,
        "request_decode_time_seconds_count": 1,
        "request_inference_time_seconds_sum": 4.0,
        "request_inference_time_seconds_count": 1,
        "request_prompt_tokens_sum": 5,
        "request_prompt_tokens_count": 1,
        "request_generation_tokens_sum": 4,
        "request_generation_tokens_count": 1,
        "request_success_totallength": 1,
    }


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda r: r.on_deltas([_delta("a", finish_reason="abort")]), "abort"),
        (lambda r: r.on_error("a"), "error"),
    ],
)
def test_a_request_without_a_token_has_no_latency_of_tokens(
    recorder: RequestRecorder, clock: FakeClock, end: Callable[[RequestRecorder], None], reason: str
) -> None:
    recorder.on_arrival(make_samples("a", clock))
    clock.now += 2
    end(recorder)
    assert _values(recorder) == {
        "e2e_request_latency_seconds_sum": 2.0,
        "e2e_request_latency_seconds_count": 1,
        "request_prompt_tokens_sum": 3,
        "request_prompt_tokens_count": 1,
        "request_generation_tokens_count": 1,
        f"request_success_total{reason}": 1,
    }
    assert recorder.num_in_flight == 0


def test_each_sample_ends_once_and_an_error_ends_those_that_are_left(
    recorder: RequestRecorder, clock: FakeClock
) -> None:
    recorder.on_arrival(make_samples("a", clock, count=3))
    recorder.on_deltas([_delta("a", 1, sample=1, finish_reason="stop")])
    assert recorder.num_in_flight == 1
    recorder.on_error("a")
    recorder.on_error("a")
    recorder.on_deltas([_delta("a", 2, sample=0, finish_reason="stop")])  # too late
    found = _values(recorder)
    assert (found["request_success_totalstop"], found["request_success_totalerror"]) == (1, 2)
    assert recorder.num_in_flight == 0


def test_activity_is_taken_once_and_stays_while_a_request_is_in_flight(
    recorder: RequestRecorder, clock: FakeClock
) -> None:
    seen = [recorder.take_activity()]
    recorder.on_arrival(make_samples("a", clock))
    seen += [recorder.take_activity(), recorder.take_activity()]
    recorder.on_deltas([_delta("a", 1, finish_reason="stop")])
    seen += [recorder.take_activity(), recorder.take_activity()]
    assert seen == [False, True, True, True, False]


def test_every_reason_is_exported_before_it_happens(recorder: RequestRecorder) -> None:
    (success,) = [family for family in recorder.collect() if family.name == "moe_runtime:request_success"]
    assert [s.labels["finished_reason"] for s in success.samples] == list(FINISH_REASONS)
    assert {s.name for f in recorder.collect() for s in f.samples if s.name.endswith("_created")} == set()
