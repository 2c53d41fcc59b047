"""Ledger: when things happened to a request."""

from __future__ import annotations

from moe_runtime.outputs import Ledger
from moe_runtime.request import EngineRequest, OutputDelta, RequestMetrics, SamplingParams


def _samples(count: int) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id="r",
            sample_index=index,
            prompt_token_ids=(1, 2),
            params=SamplingParams(n=count),
            seed=0,
            arrival_time=10.0,
        )
        for index in range(count)
    ]


def _delta(sample: int, *tokens: int, **rest: object) -> OutputDelta:
    return OutputDelta(request_id="r", sample_index=sample, new_token_ids=tokens, **rest)  # type: ignore[arg-type]


def test_a_request_knows_when_it_came_when_its_first_token_came_and_when_it_ended() -> None:
    times = iter([12.0, 17.0])
    ledger = Ledger(lambda: next(times))
    ledger.add("r", None, _samples(2))
    (output,) = ledger.outputs()
    assert output.metrics == RequestMetrics(arrival_time=10.0)

    ledger.apply(_delta(1, 5, time_in_queue=0.5))
    ledger.apply(_delta(0, 5, time_in_queue=1.5))
    ledger.apply(_delta(0, 6, finish_reason="length"))
    finished = ledger.apply(_delta(1, 6, finish_reason="stop"))

    assert finished is not None
    assert finished.metrics == RequestMetrics(
        arrival_time=10.0, first_token_time=12.0, finished_time=17.0, time_in_queue=1.5
    )


def test_a_request_knows_what_was_cached_before_its_first_sample_ran() -> None:
    ledger = Ledger()
    ledger.add("r", None, _samples(2))
    ledger.apply(_delta(1, 5, num_cached_tokens=2, finish_reason="stop"))
    ledger.apply(_delta(0, 5, num_cached_tokens=0))
    finished = ledger.apply(_delta(0, 6, finish_reason="stop"))
    assert finished is not None
    assert finished.num_cached_tokens == 0


def test_a_request_aborted_before_its_first_token_has_no_time_of_one() -> None:
    ledger = Ledger(lambda: 20.0)
    ledger.add("r", None, _samples(1))
    finished = ledger.apply(_delta(0, finish_reason="abort"))
    assert finished is not None
    assert finished.metrics == RequestMetrics(arrival_time=10.0, finished_time=20.0)
    assert finished.num_cached_tokens is None
