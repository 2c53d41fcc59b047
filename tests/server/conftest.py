"""A server around a fake engine, and clients that talk to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from moe_runtime.server.app import make_app
from moe_runtime.server.connections import GuardedProtocol
from tests.server.fake_engine import FakeEngine, server_config

Scenario = Callable[[], Awaitable[None]]


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """The application on a loopback port; yields its URL."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=GuardedProtocol, host="127.0.0.1", port=0, log_level="critical", lifespan="off"
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


class Served:
    """One test's server: its engine, its application, and clients for it."""

    def __init__(self, engine: FakeEngine | None = None, **settings: Any) -> None:
        self.engine = engine or FakeEngine()
        self.app = make_app(self.engine, server_config(**settings))
        self.state = self.app.state.server

    def client(self, **headers: str) -> httpx2.AsyncClient:
        """A client inside this process, without a socket."""
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=True)
        return httpx2.AsyncClient(transport=transport, base_url="http://server", headers=headers)

    def openai(self, api_key: str = "unused") -> openai.AsyncOpenAI:
        """The official client, inside this process."""
        return openai.AsyncOpenAI(
            base_url="http://server/v1", api_key=api_key, http_client=self.client(), max_retries=0
        )

    def listening(self) -> AbstractAsyncContextManager[str]:
        """On a loopback port."""
        return listening(self.app)

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """Send a JSON body."""
        async with self.client(**headers) as client:
            return await client.post(path, json=body)


@pytest.fixture
def run() -> Callable[[Awaitable[None]], None]:
    """Run a coroutine to its end, in a loop of its own."""

    def run(scenario: Awaitable[None]) -> None:
        async def limited() -> None:
            await asyncio.wait_for(scenario, 30)

        asyncio.run(limited())

    return run
