"""GrammarCache: the compiled grammars of a rank, made beside the step loop, the least used forgotten first."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.compiler import GrammarCompiler
from moe_runtime.grammar.workers import Workers
from moe_runtime.structured_outputs import StructuredOutputsParams

MAX_CACHED_BYTES = 256 << 20
# A driver has compiled what it sends within a shorter time; this holds against what comes past it.
TIME_LIMIT_S = 60.0


class GrammarCache:
    """Futures of compiled grammars by what they were made from. Threads may share it."""

    def __init__(
        self,
        make_compiler: Callable[[], GrammarCompiler],
        *,
        max_bytes: int = MAX_CACHED_BYTES,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        """
        Args:
            make_compiler: called once, on a worker's thread, when the first grammar is asked for.
            max_bytes: of compiled grammars that are kept; those in use live on.
        """
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._max_bytes = max_bytes
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._workers = Workers("grammar-compiler", 1)
        self._given_up: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._futures: OrderedDict[StructuredOutputsParams, Future[Any]] = OrderedDict()

    def get(self, params: StructuredOutputsParams) -> Future[Any]:
        """The compiled grammar, or ConfigError, when it is ready."""
        with self._lock:
            future = self._futures.get(params)
            if future is None:
                future = self._futures[params] = Future()
                started = future
                self._workers.submit(lambda: self._compile(params, started))
            self._futures.move_to_end(params)
            return future

    @property
    def num_bytes(self) -> int:
        """Of the compiled grammars that are kept."""
        with self._lock:
            return sum(map(_size, self._futures.values()))

    def _compile(self, params: StructuredOutputsParams, future: Future[Any]) -> bool:
        timer = threading.Timer(self._time_limit_s, self._give_up, (params, future))
        timer.daemon = True
        timer.start()
        try:
            if self._compiler is None:
                self._compiler = self._make_compiler()
            grammar = self._compiler.compile(params)
        except Exception as error:
            self._fail(params, future, error)
        else:
            with suppress(InvalidStateError):  # it was given up
                future.set_result(grammar)
        finally:
            timer.cancel()
        self._forget_least_used()
        with self._lock:
            return future not in self._given_up

    def _give_up(self, params: StructuredOutputsParams, future: Future[Any]) -> None:
        with self._lock:
            if future.done():
                return
            self._given_up.add(future)
            self._workers.add_one()
        reason = f"structured_outputs.{params.kind} took more than {self._time_limit_s:g} s to compile; simplify it"
        self._fail(params, future, ConfigError(reason))

    def _fail(self, params: StructuredOutputsParams, future: Future[Any], error: Exception) -> None:
        with self._lock:
            if self._futures.get(params) is future:
                del self._futures[params]
        if not isinstance(error, MoeRuntimeError):
            error = ConfigError(f"structured_outputs.{params.kind} could not be compiled: {error}")
        with suppress(InvalidStateError):
            future.set_exception(error)

    def _forget_least_used(self) -> None:
        with self._lock:
            kept = sum(map(_size, self._futures.values()))
            for params in [p for p, future in self._futures.items() if future.done()]:
                if kept <= self._max_bytes:
                    return
                kept -= _size(self._futures.pop(params))


def _size(future: Future[Any]) -> int:
    return future.result().memory_size_bytes if future.done() and future.exception() is None else 0
