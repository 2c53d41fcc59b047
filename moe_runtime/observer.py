"""RequestObserver: who wants to see what happens to a driver's requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_runtime.request import EngineRequest, OutputDelta


class RequestObserver(Protocol):
    """Told of every request as it happens. Calls come from several threads and must return at once.

    A request's `on_arrival` comes first. Each of its samples ends once: with a delta that has a finish reason
    ("stop", "length", "abort"), or with `on_error`.
    """

    def on_arrival(self, samples: Sequence[EngineRequest]) -> None:
        """A request is sent to a rank; its samples share a request id and a prompt."""
        ...

    def on_deltas(self, deltas: Sequence[OutputDelta]) -> None:
        """Pieces of output arrived, all at this moment; at most one of each sample."""
        ...

    def on_error(self, request_id: str) -> None:
        """A request, with those of its samples that have not ended, ended with an error or was refused."""
        ...


class NoObserver:
    """Sees nothing."""

    def on_arrival(self, samples: Sequence[EngineRequest]) -> None:
        """See RequestObserver."""

    def on_deltas(self, deltas: Sequence[OutputDelta]) -> None:
        """See RequestObserver."""

    def on_error(self, request_id: str) -> None:
        """See RequestObserver."""
