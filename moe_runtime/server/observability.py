"""/metrics and /v1/load: what a deployment shows of itself, once it has started."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from moe_runtime.server.http import json_answer
from moe_runtime.server.state import ServerState


class ObservabilityRoutes:
    """Both may wait for the ranks, in a thread; the ranks are asked at most once a second, whoever asks."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def metrics(self, http: Request) -> Response:
        """In Prometheus' text format, or in OpenMetrics' where the request accepts it."""
        render = self._state.metrics.render
        body, content_type = await asyncio.to_thread(render, http.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    async def load(self, http: Request) -> Response:
        """Where the experts' load is now; see docs/metrics.md."""
        return json_answer(await asyncio.to_thread(self._state.metrics.load_snapshot))
