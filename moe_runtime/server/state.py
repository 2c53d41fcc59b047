"""ServerState: what all requests of one server share."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.server.admission import Admission
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.engine_api import ServedEngine
from moe_runtime.server.errors import ApiError, unavailable

if TYPE_CHECKING:
    from moe_runtime.server.generation import Generation

# For answers that were cut off to reach their clients.
_LAST_WORDS_S = 2.0


class ServerState:
    """Used on the server's event loop only; `app.state.server` is one."""

    def __init__(
        self,
        config: ServerConfig,
        engine: ServedEngine | None,
    ) -> None:
        self.config = config
        self.admission = Admission(config.max_concurrent_requests)
        self.created = int(time.time())
        self.generations: set[Generation] = set()
        self._engine = engine
        self._metrics: DeploymentMetrics | None = None
        self._failed = False

    @property
    def engine(self) -> ServedEngine:
        """The engine; ApiError 503 while it starts and after it has failed."""
        if self._failed:
            raise unavailable("the model's ranks have failed and serve no requests now", "engine_dead")
        if self._engine is None:
            raise unavailable("the model is still starting", "starting")
        return self._engine

    @property
    def metrics(self) -> DeploymentMetrics:
        """What is shown of the deployment; ApiError 503 while it starts."""
        if self._metrics is None:
            raise unavailable("the model is still starting", "starting")
        return self._metrics

    def attach(self, engine: ServedEngine, metrics: DeploymentMetrics) -> None:
        """The engine has started."""
        self._engine = engine
        self._metrics = metrics

    def fail(self) -> None:
        """The engine has ended by itself."""
        self._failed = True

    async def drain(self, timeout_s: float, hurry: asyncio.Event | None = None) -> bool:
        """Let nobody in, and finish what is at work; returns whether all of it was finished.

        What has not ended after `timeout_s`, or when `hurry` is set, is aborted, and its clients are told.
        """
        self.admission.close()
        finished = asyncio.ensure_future(self.admission.wait_idle(timeout_s))
        waits: list[asyncio.Future[bool]] = [finished]
        if hurry is not None:
            waits.append(asyncio.ensure_future(hurry.wait()))
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if finished.done() and not finished.cancelled() and finished.result():
            return True
        self._abort_all(
            unavailable("the server was shut down before the answer was complete", "shutting_down")
        )
        await self.admission.wait_idle(_LAST_WORDS_S)
        return False

    def _abort_all(self, error: ApiError) -> None:
        for generation in list(self.generations):
            generation.fail(error)
