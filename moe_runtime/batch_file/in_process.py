"""InProcessHandle: requests of a batch through an HTTP application in this process, with no socket between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx2

from moe_runtime.batch_file.answers import Answer


class InProcessHandle:
    """Answers a request as a client of the application would get it; used in a `async with` block."""

    def __init__(self, app: Any, check_health: Callable[[], Awaitable[None]]) -> None:
        """
        Args:
            app: an ASGI application.
            check_health: called when the application answers that the fault is its own; a MoeRuntimeError that
                it raises says that no other request can be served either.
        """
        transport = httpx2.ASGITransport(app=app)
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://in-process", timeout=None)
        self._check_health = check_health

    async def __aenter__(self) -> InProcessHandle:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._http.aclose()

    async def __call__(self, url: str, body: dict[str, Any]) -> Answer:
        response = await self._http.post(url, json=body)
        if response.status_code >= 500:
            await self._check_health()
        return Answer(
            status=response.status_code,
            request_id=response.headers.get("x-request-id", ""),
            body=response.json(),
        )
