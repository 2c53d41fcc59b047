"""GrammarGate: structured requests wait here until their grammars are compiled; all others go on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.grammar.cache import GrammarCache
from moe_runtime.transport.mailbox import Submitted

# What becomes of a request: its xgrammar.CompiledGrammar, or why it has none.
Outcome = Any | MoeRuntimeError


@dataclass(slots=True, eq=False)
class _Waiting:
    submitted: Submitted


class GrammarGate:
    """Used by the step loop's thread alone; only `call_soon` is called from others."""

    def __init__(
        self,
        cache: GrammarCache,
        call_soon: Callable[[Callable[[], None]], None],
        on_ready: Callable[[Submitted, Outcome], None],
    ) -> None:
        """
        Args:
            call_soon: has the step loop's thread call a function.
            on_ready: takes a request and what became of it, on the step loop's thread.
        """
        self._cache = cache
        self._call_soon = call_soon
        self._on_ready = on_ready
        self._waiting: dict[str, list[_Waiting]] = {}  # by request id

    @property
    def num_waiting(self) -> int:
        """Samples whose grammars are being compiled."""
        return sum(map(len, self._waiting.values()))

    def enter(self, submitted: Submitted) -> None:
        """Take a structured request; `on_ready` gets it, at once if its grammar is there."""
        request = submitted.request
        params = request.params.structured_outputs
        assert params is not None, "only structured requests wait for a grammar"
        future = self._cache.get(params)
        if future.done():
            self._on_ready(submitted, _outcome(future))
            return
        waiting = _Waiting(submitted)
        self._waiting.setdefault(request.request_id, []).append(waiting)
        future.add_done_callback(lambda done: self._call_soon(lambda: self._leave(waiting, done)))

    def abort(self, request_id: str) -> list[Submitted]:
        """Forget the samples of a request that wait; returns them."""
        return [waiting.submitted for waiting in self._waiting.pop(request_id, [])]

    def _leave(self, waiting: _Waiting, future: Future[Any]) -> None:
        request_id = waiting.submitted.request.request_id
        others = self._waiting.get(request_id, [])
        if waiting not in others:
            return  # aborted
        others.remove(waiting)
        if not others:
            del self._waiting[request_id]
        self._on_ready(waiting.submitted, _outcome(future))


def _outcome(future: Future[Any]) -> Outcome:
    error = future.exception()
    assert error is None or isinstance(error, MoeRuntimeError)
    return error if error is not None else future.result()
