"""What `bench serve` computes: scripted answers to records, records to vLLM's metrics. No network and no clock."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_runtime.bench.serving.answer import AnswerReader, RequestRecord
from moe_runtime.bench.serving.block import result_block
from moe_runtime.bench.serving.metrics import (
    compute_metrics,
    meets,
    parse_goodput,
    peak_concurrency,
    percentile,
)
from moe_runtime.bench.serving.workload import ServeWorkload
from moe_runtime.errors import ConfigError


def _record(sent_s: float, *chunk_times_s: float, tokens: int, **changes: Any) -> RequestRecord:
    record = RequestRecord(
        planned_s=sent_s,
        sent_s=sent_s,
        chunk_times_s=chunk_times_s,
        ended_s=chunk_times_s[-1],
        prompt_tokens=10,
        output_tokens=tokens,
    )
    return replace(record, **changes)


def _read(*events: tuple[float, Any], cut: int | None = None) -> RequestRecord:
    """The record of a request sent at 1.0 whose events arrive at these times, in pieces of `cut` bytes."""
    reader = AnswerReader()
    for time_s, content in events:
        text = content if isinstance(content, str) else json.dumps(content)
        data = f"data: {text}\r\n\r\n".encode()
        size = cut or len(data)
        for start in range(0, len(data), size):
            reader.feed(data[start : start + size], time_s)
    return reader.record(planned_s=0.5, sent_s=1.0, closed_s=9.0, prompt_len=3)


def _text(text: str, finish_reason: str | None = None) -> Any:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def _delta(finish_reason: str | None = None, **delta: Any) -> Any:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}


@pytest.mark.parametrize("cut", [None, 1, 7])
def test_a_completion_is_timed_by_its_chunks_and_counted_by_its_usage(cut: int | None) -> None:
    record = _read(
        (1.5, _text("a")), (1.7, _text("")), (2.0, _text("b", "stop")), (2.1, USAGE), (2.1, "[DONE]"), cut=cut
    )

    assert record.error is None
    assert record.chunk_times_s == (1.5, 1.7, 2.0)
    assert (record.prompt_tokens, record.output_tokens, record.counted_by_server) == (5, 4, True)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.itls_s == pytest.approx([0.2, 0.3])
    assert record.e2el_s == pytest.approx(1.0)  # usage and [DONE] are not part of it
    assert record.tpot_s == pytest.approx(0.5 / 3)


def test_a_chat_chunk_without_output_is_no_token_and_the_end_is_that_of_its_reason() -> None:
    record = _read(
        (1.1, _delta(role="assistant", content="")),
        (1.5, _delta(reasoning_content="hm")),
        (1.6, _delta(content="a")),
        (1.9, _delta("length")),
        (2.0, "[DONE]"),
    )

    assert record.chunk_times_s == (1.5, 1.6)
    assert record.e2el_s == pytest.approx(0.9)


def test_without_usage_chunks_are_counted_and_the_prompt_is_as_long_as_it_was_made() -> None:
    record = _read((1.5, _text("a")), (1.6, _text("b", "length")), (1.6, "[DONE]"))

    assert (record.prompt_tokens, record.output_tokens, record.counted_by_server) == (3, 2, False)


def test_the_only_token_may_have_no_text() -> None:
    record = _read((1.5, _text("", "length")), (1.5, "[DONE]"))

    assert record.error is None
    assert (record.ttft_s, record.tpot_s, record.itls_s) == (0.5, None, [])


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([(1.5, _text("a"))], "the stream ended before the answer was complete"),
        ([(1.5, "[DONE]")], "the answer has no output"),
        ([(1.5, _text("a")), (1.6, {"error": {"message": "rank 1 died"}})], "rank 1 died"),
        ([(1.5, "{")], "an event is no JSON: b'{'"),
    ],
)
def test_a_broken_answer_is_an_error(events: list[tuple[float, Any]], error: str) -> None:
    record = _read(*events)

    assert record.error == error
    assert record.ended_s == 9.0


RECORDS = [
    _record(0.0, 0.2, 0.3, 0.4, tokens=3),
    _record(0.1, 0.5, 1.1, tokens=5),  # two chunks of several tokens
    _record(0.4, 0.5, tokens=1, counted_by_server=False),  # no second token: no TPOT
    _record(0.2, 0.9, tokens=7, planned_s=0.1, error="HTTP 503: full"),
]


def test_metrics_are_those_of_vllm_on_a_scripted_timeline() -> None:
    metrics = compute_metrics(RECORDS, 2.0, percentiles=(90.0, 99.0), goodput_ms={"ttft": 200.5, "tpot": 120})
    result = metrics.to_dict()

    assert (result["completed"], result["failed"], result["first_error"]) == (3, 1, "HTTP 503: full")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 9)
    assert result["request_throughput"] == 1.5
    assert result["output_throughput"] == 4.5
    assert result["total_token_throughput"] == 19.5
    assert result["request_goodput"] == 1.0  # the first, and the one that has a single token
    assert result["outputs_counted_by_chunks"] == 1
    assert result["max_output_tokens_per_s"] == pytest.approx(3 + 2.5 + 1)  # 0 to 1 s; 2.5 more came after
    assert result["max_concurrent_requests"] == 3
    samples = {
        "ttft": [200, 400, 100],
        "tpot": [100, 150],
        "itl": [100, 100, 600],
        "e2el": [400, 1000, 100],
        "send_delay": [0, 0, 0, 100],
    }
    for name, values in samples.items():
        assert result[f"mean_{name}_ms"] == pytest.approx(np.mean(values), abs=1e-3)
        assert result[f"median_{name}_ms"] == pytest.approx(np.median(values), abs=1e-3)
        assert result[f"std_{name}_ms"] == pytest.approx(np.std(values), abs=1e-3)
        assert result[f"p90_{name}_ms"] == pytest.approx(np.percentile(values, 90), abs=1e-3)
        assert result[f"p99_{name}_ms"] == pytest.approx(np.percentile(values, 99), abs=1e-3)


def test_a_run_without_a_success_has_metrics_too() -> None:
    result = compute_metrics([RECORDS[3]], 1.0, goodput_ms={"ttft": 1.0}).to_dict()

    assert (result["completed"], result["request_goodput"], result["p99_ttft_ms"]) == (0, 0.0, 0.0)


@pytest.mark.parametrize("percent", [0, 12.5, 50, 99, 100])
def test_percentiles_are_numpys(percent: float) -> None:
    values = sorted(np.random.default_rng(0).normal(size=37).tolist())

    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_requests_that_follow_each_other_are_not_concurrent() -> None:
    assert peak_concurrency([_record(0.0, 1.0, tokens=1), _record(1.0, 2.0, tokens=1)]) == 1
    assert peak_concurrency([_record(0.0, 1.5, tokens=1), _record(1.0, 2.0, tokens=1)]) == 2


@pytest.mark.parametrize(
    ("objectives", "kept"),
    [
        ({"ttft": 400.5}, True),
        ({"ttft": 399.0}, False),
        ({"ttft": 400.5, "tpot": 149.0}, False),
        ({"e2el": 1000.5, "tpot": 150.5}, True),
    ],
)
def test_goodput_takes_every_objective(objectives: dict[str, float], kept: bool) -> None:
    assert meets(RECORDS[1], objectives) is kept


def test_objectives_are_pairs_as_in_vllm() -> None:
    assert parse_goodput(["ttft:500", "tpot:50.5"]) == {"ttft": 500.0, "tpot": 50.5}
    for pair, words in {
        "tftt:500": "wanted one of ttft, tpot, e2el and milliseconds, such as ttft:500; did you mean 'ttft'?",
        "itl:5": "wanted one of ttft, tpot, e2el",
        "ttft": "wanted milliseconds of at least 0, such as ttft:500",
        "ttft:-1": "wanted milliseconds of at least 0",
    }.items():
        with pytest.raises(ConfigError, match=f"--goodput {pair}: {words}".replace("?", r"\?")):
            parse_goodput([pair])


def test_the_block_has_vllms_lines() -> None:
    workload = ServeWorkload(percentile_metrics=("ttft", "e2el"), max_concurrency=4, request_rate=2.5)
    lines = result_block(compute_metrics(RECORDS, 2.0, goodput_ms={"ttft": 1.0}), workload).splitlines()

    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     3"
    assert "  the first failed with: HTTP 503: full" in lines
    assert "Maximum request concurrency:             4" in lines
    assert "Request rate configured (RPS):           2.50" in lines
    assert "Request goodput (req/s):                 0.00" in lines
    assert "---------------Time to First Token----------------" in lines
    assert "Mean TTFT (ms):                          233.33" in lines
    assert "P99 E2EL (ms):                           988.00" in lines
    assert not any("TPOT" in line for line in lines)
    assert lines[-1] == "=" * 50
