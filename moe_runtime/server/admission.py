"""Admission: how many requests are at work, whether more are let in, and the wait for the last one."""

from __future__ import annotations

import asyncio

from moe_runtime.server.errors import too_busy, unavailable


class Admission:
    """Counts requests on the server's event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_active = 0

    @property
    def is_closed(self) -> bool:
        """Whether the server is shutting down."""
        return self._closed

    def enter(self) -> None:
        """Let a request in; the caller owes `leave`.

        Raises:
            ApiError: 503 during shut-down, 429 when too many are at work.
        """
        if self._closed:
            raise unavailable("the server is shutting down", "shutting_down")
        if self.num_active >= self._limit:
            raise too_busy(
                f"{self.num_active} requests are at work and no more than {self._limit} are let in; "
                "try again later",
                "too_many_requests",
            )
        self.num_active += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has been answered, or its client has left."""
        self.num_active -= 1
        if not self.num_active:
            self._idle.set()

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is at work; False if some still are after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
