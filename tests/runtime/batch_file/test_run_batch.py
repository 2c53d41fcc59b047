"""run_batch: every request gets one answer, few at a time, and no request's error stops the others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.batch_file.answers import Answer, AnswerFile
from moe_runtime.batch_file.requests import BatchRequest
from moe_runtime.batch_file.run import BatchSummary, Handle, run_batch
from moe_runtime.errors import EngineDeadError

REQUESTS = [BatchRequest(n + 1, f"r{n}", "/v1/completions", {"n": n}) for n in range(20)]


def _run(
    path: Path, handle: Handle, *, concurrency: int = 4, retry_delays_s: Sequence[float] = (0, 0)
) -> tuple[BatchSummary, dict[str, Any]]:
    """The summary, and what the output holds by custom_id."""
    ids = [request.custom_id for request in REQUESTS]
    done: list[bool] = []
    with AnswerFile(path, ids) as output:
        summary = BatchSummary(total=len(ids), skipped=len(output.answered))
        running = run_batch(
            REQUESTS,
            handle,
            output,
            summary,
            concurrency=concurrency,
            on_done=done.append,
            retry_delays_s=retry_delays_s,
        )
        asyncio.run(running)
    assert (done.count(True), done.count(False)) == (summary.answered, summary.failed)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return summary, {line["custom_id"]: line for line in lines}


async def _echo(url: str, body: dict[str, Any]) -> Answer:
    await asyncio.sleep(0)
    return Answer(status=200, body={"url": url, **body})


def test_every_request_gets_its_own_answer(tmp_path: Path) -> None:
    summary, lines = _run(tmp_path / "out", _echo)
    assert str(summary) == "20 of 20 requests answered"
    for request in REQUESTS:
        assert lines[request.custom_id]["response"]["body"] == {"url": request.url, **request.body}


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_no_more_requests_than_allowed_are_at_work(concurrency: int, tmp_path: Path) -> None:
    at_work = most = 0

    async def handle(url: str, body: dict[str, Any]) -> Answer:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0)
        at_work -= 1
        return Answer(status=200, body={})

    _run(tmp_path / "out", handle, concurrency=concurrency)
    assert most == min(concurrency, len(REQUESTS))


def test_errors_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    async def handle(url: str, body: dict[str, Any]) -> Answer:
        if body["n"] == 3:
            return Answer(status=400, body={"error": {"message": "bad"}})
        if body["n"] == 5:
            raise KeyError("lost")
        return Answer(status=200, body={})

    summary, lines = _run(tmp_path / "out", handle)
    assert str(summary) == "18 of 20 requests answered, 2 failed (1 with no answer, 1 with status 400)"
    assert lines["r3"]["response"]["status_code"] == 400
    assert lines["r5"]["error"]["message"] == "KeyError: 'lost'"

    summary, lines = _run(tmp_path / "out", _echo)
    assert str(summary) == "2 of 20 requests answered, 18 by an earlier run"
    assert {line["response"]["status_code"] for line in lines.values()} == {200}


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_for_a_while(status: int, tmp_path: Path) -> None:
    tries: dict[int, int] = {}

    async def handle(url: str, body: dict[str, Any]) -> Answer:
        tries[body["n"]] = tries.get(body["n"], 0) + 1
        enough = {0: 3, 1: 99}.get(body["n"], 1)
        return Answer(status=200 if tries[body["n"]] >= enough else status, body={})

    summary, _ = _run(tmp_path / "out", handle)
    assert (tries[0], tries[1], tries[2]) == (3, 3, 1)
    assert str(summary) == f"19 of 20 requests answered, 1 failed (1 with status {status})"


def test_the_end_of_the_engine_ends_the_batch_and_the_next_run_goes_on(tmp_path: Path) -> None:
    cancelled = 0

    async def handle(url: str, body: dict[str, Any]) -> Answer:
        nonlocal cancelled
        if body["n"] == 7:
            raise EngineDeadError("rank 1 died")
        try:
            await asyncio.sleep(0 if body["n"] < 4 else 60)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return Answer(status=200, body={})

    with pytest.raises(EngineDeadError, match="rank 1 died"):
        _run(tmp_path / "out", handle)
    assert cancelled == 3
    summary, _ = _run(tmp_path / "out", _echo)
    assert str(summary) == "16 of 20 requests answered, 4 by an earlier run"
