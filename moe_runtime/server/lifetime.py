"""Serving until a signal or the engine's end: ready line, graceful shut-down, exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType

from moe_runtime.async_llm import AsyncLLM
from moe_runtime.errors import EngineDeadError, MoeRuntimeError
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.server.listener import HttpServer
from moe_runtime.server.state import ServerState

# A request whose client has all of its answer, or has left, counts as active for some milliseconds more.
_WORTH_SAYING_S = 0.5


@dataclass(frozen=True, slots=True)
class _Signalled:
    number: int


@dataclass(frozen=True, slots=True)
class _EngineEnded:
    error: MoeRuntimeError | None


@dataclass(frozen=True, slots=True)
class _Drained:
    complete: bool


_Event = _Signalled | _EngineEnded | _Drained


def serve_until_stopped(
    engine: AsyncLLM,
    metrics: DeploymentMetrics,
    state: ServerState,
    http: HttpServer,
    *,
    ready_line: str,
    shutdown_timeout_s: float,
) -> None:
    """Let requests in, and return when a signal has ended the server and what was at work is finished.

    SIGINT or SIGTERM lets nobody in any more and finishes what is at work; a second one aborts it.

    Args:
        shutdown_timeout_s: after which what is still at work is aborted.

    Raises:
        MoeRuntimeError: what ended the engine, if it ended by itself.
    """
    events: SimpleQueue[_Event] = SimpleQueue()
    with _signals_to(events):
        engine.on_end(lambda error: events.put(_EngineEnded(error)))
        http.call_soon(state.attach, engine, metrics)
        print(ready_line, flush=True)
        first = events.get()
        if isinstance(first, _EngineEnded):
            http.run(_fail(state, shutdown_timeout_s)).result()
            raise first.error or EngineDeadError("the deployment was stopped; start it anew")
        hurry = asyncio.Event()
        draining = http.run(state.drain(shutdown_timeout_s, hurry))
        draining.add_done_callback(lambda future: events.put(_Drained(future.result())))
        wait_s: float | None = _WORTH_SAYING_S
        while not isinstance(event := _next(events, wait_s), _Drained):
            if isinstance(event, _Signalled):
                http.call_soon(hurry.set)
            elif event is None:
                wait_s, num_active = None, state.admission.num_active
                _say(
                    f"finishing {num_active} requests within {shutdown_timeout_s:g} s; Ctrl-C again aborts them"
                )
        if not event.complete:
            _say("aborted what was still at work")


def _next(events: SimpleQueue[_Event], wait_s: float | None) -> _Event | None:
    """None if there is no event in that time."""
    try:
        return events.get(timeout=wait_s)
    except Empty:
        return None


async def _fail(state: ServerState, timeout_s: float) -> None:
    """The engine has ended every request; give their last words time to reach the clients."""
    state.fail()
    await state.drain(timeout_s)


@contextmanager
def _signals_to(events: SimpleQueue[_Event]) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        events.put(_Signalled(number))

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"moe-runtime: {text}", file=sys.stderr, flush=True)
