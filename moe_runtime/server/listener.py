"""HttpServer: uvicorn in a thread of the driver, whose main thread is free for the engine and for signals."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import uvicorn
from fastapi import FastAPI

from moe_runtime.cluster import joined_node_ip
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.server.connections import GuardedProtocol

T = TypeVar("T")

_BACKLOG = 2048
# For connections that have nothing at work: requests were drained before.
_CLOSE_TIMEOUT_S = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files of a certificate and its key."""

    certificate: str
    key: str


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address is not this machine's, or the port is in use.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"cannot listen on --port {port}; a port is from 0 (a free one) to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once: two sockets may be bound to a port as long as none of them listens.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {error}; choose another --port (0 takes a free one)"
        ) from error
    return listener


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """Where clients reach a server that listens on `host`.

    If that is all addresses, it is the node's own where a cluster was joined, whose logs are read elsewhere.
    """
    name = (joined_node_ip() or "127.0.0.1") if host in ("", "0.0.0.0", "::") else host
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"


class HttpServer:
    """Serves from the start of the `with` block to its end."""

    def __init__(
        self, app: FastAPI, listener: socket.socket, *, tls: Tls | None = None, log_level: str = "warning"
    ) -> None:
        """
        Args:
            listener: a listening socket; the server closes it.
            log_level: of uvicorn; with "info" it logs every request.
        """
        self._listener = listener
        self._tls = tls
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            log_config=None,
            log_level=log_level,
            access_log=log_level in ("trace", "debug", "info"),
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
        )
        self._server = _AnnouncingServer(config, self._started)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise MoeRuntimeError(f"the HTTP server did not start: {self._failure}") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def url(self, host: str) -> str:
        """Where clients reach it; `host` is what was listened on."""
        return url_of(host, self._listener.getsockname()[1], "https" if self._tls else "http")

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Have the server's event loop call a function."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *args)

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the server's event loop run a coroutine."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve([self._listener])

        try:
            asyncio.run(serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: threading.Event) -> None:
        super().__init__(config)
        self._announced = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announced.set()
