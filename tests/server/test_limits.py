"""Keys, origins, sizes, numbers and times: who is let in, and how many."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.server.app import make_app
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine, server_config

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Bearer first ", 200),
        ("Bearer second", 200),
        ("bearer second", 200),
        ("Basic second", 401),
        ("second", 401),
        ("Bearer firstsecond", 401),
    ],
)
def test_every_key_opens_every_route(
    run: Callable[..., None], authorization: str | None, status: int
) -> None:
    async def scenario() -> None:
        served = Served(api_keys=("first", "second"))
        headers = {} if authorization is None else {"authorization": authorization}
        async with served.client(**headers) as client:
            response = await client.post(COMPLETIONS, json={"prompt": "a"})
            assert response.status_code == status
            assert (await client.get("/v1/ranks")).status_code == status
            assert (await client.get("/nothing")).status_code == (status if status == 401 else 404)
            if status == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["type"] == "authentication_error"

    run(scenario())


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/version", 200), ("/metrics", 503), ("/", 404)]
)
def test_probes_need_no_key(run: Callable[..., None], path: str, status: int) -> None:
    async def scenario() -> None:
        async with Served(api_keys=("key",)).client() as client:
            assert (await client.get(path)).status_code == status

    run(scenario())


def test_only_allowed_origins_may_be_asked_from(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        closed = Served(api_keys=("key",))
        opened = Served(api_keys=("key",), allowed_origins=("https://a.example",))
        async with closed.client() as client:
            assert (
                "access-control-allow-origin"
                not in (await client.options(COMPLETIONS, headers=preflight)).headers
            )
        async with opened.client() as client:
            allowed = await client.options(COMPLETIONS, headers=preflight)
            refused = await client.options(COMPLETIONS, headers={**preflight, "origin": "https://b.example"})
            unauthorized = await client.post(COMPLETIONS, json=BODY, headers={"origin": "https://a.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in refused.headers
        assert unauthorized.status_code == 401
        assert unauthorized.headers["access-control-allow-origin"] == "https://a.example"

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused(run: Callable[..., None], announced: bool) -> None:
    async def scenario() -> None:
        served = Served(max_body_bytes=1000)
        body = json.dumps({"prompt": "a" * 3000}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        async with served.listening() as url, httpx2.AsyncClient(base_url=url) as client:
            response = await client.post(COMPLETIONS, content=body if announced else pieces())
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
            assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200

    run(scenario())


def test_by_default_four_megabytes_are_taken(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        body = {"prompt": "a", "user": "u" * 4 * 2**20}
        assert (await Served().post(COMPLETIONS, body)).status_code == 200

    run(scenario())


def test_a_body_that_does_not_come_is_not_waited_for(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(body_timeout_s=0.05)
        async with served.listening() as url:
            address = urlsplit(url)
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{{".encode())
            assert (await reader.readline()).split()[1] == b"408"
            writer.close()

    run(scenario())


def test_requests_beyond_the_limit_are_told_to_come_again(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(max_concurrent_requests=2)
        served.engine.gate.clear()
        running = [asyncio.create_task(served.post(COMPLETIONS, BODY)) for _ in range(2)]
        await _until(lambda: len(served.engine.running) == 2)
        refused = await served.post(COMPLETIONS, BODY)
        async with served.client() as client:
            assert (await client.get("/health")).status_code == 200
        served.engine.gate.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await served.post(COMPLETIONS, {"prompt": "a"})).status_code == 200

    run(scenario())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_that_takes_too_long_is_aborted(run: Callable[..., None], streamed: bool) -> None:
    async def scenario() -> None:
        served = Served(request_timeout_s=0.05)
        served.engine.gate.clear()
        response = await served.post(COMPLETIONS, {**BODY, "stream": streamed})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
        assert served.engine.aborted == served.engine.started

    run(scenario())


def test_until_the_engine_is_there_everything_waits(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        app = make_app(None, server_config())
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            for response in (
                await client.get("/health"),
                await client.get("/v1/models"),
                await client.post(COMPLETIONS, json=BODY),
            ):
                assert (response.status_code, response.json()["error"]["code"]) == (503, "starting")
                assert "retry-after" in response.headers
            assert (await client.get("/version")).status_code == 200
            app.state.server.attach(FakeEngine(), DeploymentMetrics(list, model_name="demo"))
            assert (await client.get("/health")).status_code == 200
            app.state.server.fail()
            assert (await client.post(COMPLETIONS, json=BODY)).json()["error"]["code"] == "engine_dead"

    run(scenario())


def test_health_is_bad_when_a_rank_does_not_answer(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.healthy = False
        async with served.client() as client:
            response = await client.get("/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unhealthy")
        assert "10.0.0.7" not in response.text

    run(scenario())


def test_ranks_are_described(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        async with Served().client() as client:
            (rank,) = (await client.get("/v1/ranks")).json()["data"]
        assert (rank["node_ip"], rank["device"], rank["kernel_plan"]) == ("10.0.0.7", "a CPU", ["norm: cpu"])
        assert rank["memory"] == {"weight_bytes": 100, "cache_bytes": 200, "cache_tokens": 300}
        assert rank["load"]["scheduler"] == {"num_running": 0}

    run(scenario())


@pytest.mark.parametrize("finishes", [True, False])
def test_shutting_down_finishes_what_is_at_work_in_time_and_aborts_the_rest(
    run: Callable[..., None], finishes: bool
) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.gate.clear()
        running = asyncio.create_task(served.post(COMPLETIONS, BODY))
        await _until(lambda: bool(served.engine.running))
        draining = asyncio.create_task(served.state.drain(20 if finishes else 0.02))
        await _until(lambda: served.state.admission.is_closed)
        late = await served.post(COMPLETIONS, BODY)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        if finishes:
            served.engine.gate.set()
        assert await draining is finishes
        assert (await running).status_code == (200 if finishes else 503)
        assert bool(served.engine.aborted) is not finishes

    run(scenario())


def test_a_hurried_shut_down_does_not_wait(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.gate.clear()
        running = asyncio.create_task(served.post(COMPLETIONS, BODY))
        await _until(lambda: bool(served.engine.running))
        hurry = asyncio.Event()
        draining = asyncio.create_task(served.state.drain(1000, hurry))
        hurry.set()
        assert await draining is False
        assert (await running).status_code == 503

    run(scenario())


def test_a_request_keeps_the_id_that_its_client_gave_it(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        given = await served.post(COMPLETIONS, {"prompt": "a"}, **{"x-request-id": "mine-1"})
        bad = await served.post(COMPLETIONS, {"prompt": "a"}, **{"x-request-id": "<script>"})
        assert given.headers["x-request-id"] == "mine-1"
        assert "script" not in bad.headers["x-request-id"]

    run(scenario())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_keys": ("",)}, "API key is empty"),
        ({"api_keys": ("schlüssel",)}, "use ASCII"),
        ({"served_model_names": ()}, "at least one name"),
        ({"max_body_bytes": 0}, "max_body_bytes must be a whole number of at least 1, got 0"),
        ({"request_timeout_s": -1.0}, "request_timeout_s must be a number of seconds above 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        server_config(**settings)


def test_five_hundred_connections_are_served_and_those_that_say_nothing_do_no_harm(
    run: Callable[..., None],
) -> None:
    async def scenario() -> None:
        served = Served()
        async with served.listening() as url:
            address = urlsplit(url)
            silent = [await asyncio.open_connection(address.hostname, address.port) for _ in range(250)]
            limits = httpx2.Limits(max_connections=250)
            async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
                answers = await asyncio.gather(
                    *(client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}) for _ in range(250))
                )
            for _, writer in silent:
                writer.close()
        assert {answer.status_code for answer in answers} == {200}

    run(scenario())
