"""Event streams byte by byte, clients that leave or take nothing, and errors in mid-stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from moe_runtime.errors import QueueFullError, RankFailedError
from moe_runtime.request import SamplingParams
from moe_runtime.server.generation import Generation, Job
from tests.server.conftest import Served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, Any] = {
    COMPLETIONS: {"prompt": "a", "stream": True, "max_tokens": 12},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 12},
}


def _request(url: str, path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(url)
    return await asyncio.open_connection(address.hostname, address.port)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("path", BODIES)
def test_every_byte_of_a_stream_is_framed(run: Callable[..., None], path: str) -> None:
    async def scenario() -> None:
        async with Served().client() as client:
            response = await client.post(path, json=BODIES[path])
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        raw = response.content
        assert raw.endswith(b"\n\ndata: [DONE]\n\n")
        assert b"\r" not in raw
        *events, done, rest = raw.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        for event in events:
            assert event.startswith(b"data: {")
            assert b"\n" not in event
            chunk = json.loads(event.removeprefix(b"data: "))
            assert chunk["id"] == json.loads(events[0].removeprefix(b"data: "))["id"]
            assert len(chunk["choices"]) == 1
        reasons = [json.loads(event[6:])["choices"][0]["finish_reason"] for event in events]
        assert reasons == [None] * (len(events) - 1) + ["length"]

    run(scenario())


def test_what_piled_up_is_taken_at_once(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        params = SamplingParams(n=2, max_tokens=12, logprobs=1, ignore_eos=True)
        job = Job(text=None, token_ids=[5, 6], params=params)
        async with Generation(
            served.state, [job], request_id="one", arrival_time=time.monotonic()
        ) as generation:
            await _until(lambda: bool(served.engine.started) and not served.engine.running)
            batch = await generation.next_batch()
            assert await generation.next_batch() == []
        assert [delta.sample_index for _, delta in batch] == [0, 1]
        for sample, (_, delta) in enumerate(batch):
            assert list(delta.new_token_ids) == served.engine.reply_ids[sample : sample + 12]
            assert delta.text == "".join(map(served.engine.tokenizer.token, delta.new_token_ids))
            assert len(delta.logprobs or ()) == 12
            assert delta.finish_reason == "length"

    run(scenario())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_request_in_the_engine(
    run: Callable[..., None], streamed: bool
) -> None:
    async def scenario() -> None:
        served = Served()
        async with served.listening() as url:
            for path, body in BODIES.items():
                served.engine.gate.clear()
                _, writer = await _connect(url)
                writer.write(_request(url, path, {**body, "stream": streamed, "n": 2}))
                await _until(lambda: len(served.engine.running) == 1)
                (request_id,) = served.engine.running
                writer.close()
                await _until(lambda: not served.engine.running)
                assert served.engine.aborted[-1] == request_id
                await _until(lambda: served.state.admission.num_active == 0)

    run(scenario())


def test_a_client_that_leaves_in_mid_stream_ends_its_request(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        body = {"prompt": "a", "stream": True, "max_tokens": 200, "ignore_eos": True}
        async with served.listening() as url:
            reader, writer = await _connect(url)
            writer.write(_request(url, COMPLETIONS, body))
            await reader.readuntil(b"data: {")
            served.engine.gate.clear()
            writer.close()
            await _until(lambda: bool(served.engine.aborted))
            assert served.engine.aborted == served.engine.started

    run(scenario())


@pytest.mark.parametrize("path", BODIES)
def test_an_error_in_mid_stream_is_the_last_event(run: Callable[..., None], path: str) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.error_after = (3, RankFailedError("rank 1 failed. Its traceback:\nFile secret.py"))
        response = await served.post(path, BODIES[path])
        *events, last, rest = response.text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert response.status_code == 200
        assert events
        assert rest == ""
        assert (error["type"], error["code"]) == ("service_unavailable", "engine_dead")
        assert "secret" not in response.text
        assert "[DONE]" not in response.text

    run(scenario())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("8 requests wait on rank 0"), 429, "queue_full"),
        (RankFailedError("rank 1 failed. Its traceback:\nFile secret.py"), 503, "engine_dead"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_an_error_before_the_first_token_has_its_status(
    run: Callable[..., None], streamed: bool, error: Exception, status: int, code: str
) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.error_after = (0, error)
        for path, body in BODIES.items():
            response = await served.post(path, {**body, "stream": streamed})
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert ("retry-after" in response.headers) == (status in (429, 503))
            assert "secret" not in response.text
            if status == 500:
                assert response.headers["x-request-id"] in response.text

    run(scenario())


def test_one_failing_prompt_of_many_ends_the_others(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        response = await served.post(COMPLETIONS, {"prompt": [[5], [9999]], "max_tokens": 100})
        assert response.status_code == 400
        assert not served.engine.running

    run(scenario())
