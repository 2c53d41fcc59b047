"""Routes about the server itself: models, health, version, ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
from fastapi import Request, Response

from moe_runtime import __version__
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.rank_spec import RankReport, RankStats
from moe_runtime.server.errors import ApiError, unavailable
from moe_runtime.server.http import json_answer
from moe_runtime.server.prompts import served_name
from moe_runtime.server.protocol.answers import ModelCard, ModelList
from moe_runtime.server.state import ServerState

T = TypeVar("T")

_MEMORY = ("weight_bytes", "cache_bytes", "cache_tokens")


class SharedCall(Generic[T]):
    """Callers that come while a call is under way share its result: probes never pile up on the ranks."""

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._running: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """The result; a caller that is cancelled leaves the call to the others."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)

    async def _run(self) -> T:
        return await self._call()


class SystemRoutes:
    """Handlers that need to remember something between requests."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._health = SharedCall(lambda: state.engine.check_health())
        self._stats = SharedCall(lambda: state.engine.stats())

    async def health(self, http: Request) -> Response:
        """200 if every rank answers, else 503."""
        if self._state.admission.is_closed:
            raise unavailable("the server is shutting down", "shutting_down")
        try:
            await self._health()
        except MoeRuntimeError:
            raise unavailable("a rank does not answer", "unhealthy") from None
        return json_answer({"status": "ok"})

    async def version(self, http: Request) -> Response:
        """Of this package."""
        return json_answer({"version": __version__})

    async def models(self, http: Request) -> Response:
        """Every name of the model."""
        names = self._state.config.served_model_names
        return json_answer(ModelList(data=[self._card(name) for name in names]))

    async def model(self, http: Request) -> Response:
        """One name of the model."""
        return json_answer(self._card(served_name(http.path_params["name"], self._state.config)))

    async def ranks(self, http: Request) -> Response:
        """What each rank is, has and does."""
        reports = self._state.engine.ranks
        stats = {of_rank.rank: of_rank for of_rank in await self._stats()}
        data = [_rank(report, stats.get(report.rank)) for report in reports]
        return json_answer({"object": "list", "data": data})

    async def embeddings(self, http: Request) -> Response:
        """Refused: the model generates text."""
        raise ApiError(
            400,
            "the model generates text and gives no embeddings; use an embedding model",
            param="model",
            code="unsupported_model",
        )

    def _card(self, name: str) -> ModelCard:
        state = self._state
        return ModelCard(
            id=name,
            created=state.created,
            root=state.config.model_root or name,
            max_model_len=state.engine.max_model_len,
        )


def _rank(report: RankReport, stats: RankStats | None) -> dict[str, Any]:
    described: dict[str, Any] = msgspec.to_builtins(report)
    memory = {name: described.pop(name) for name in _MEMORY}
    load = {} if stats is None else {"scheduler": stats.scheduler, "loop": stats.loop}
    return {**described, "memory": memory, "load": load}
