"""HttpPool: POSTs and hands on the answer's bytes the moment they arrive, with little work for each.

A load client shares a machine with what it measures more often than not, and an HTTP library for all purposes takes
two and a half times the CPU time per streamed token (docs/benchmarks.md). HTTP is parsed by httptools, as it is in the
server.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from moe_runtime.errors import ConfigError

# Between two pieces of an answer: a long prompt, or a long queue, may keep the first one waiting.
_IDLE_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 30.0

OnBody = Callable[[bytes, float], None]


class HttpError(Exception):
    """A request got no whole answer; says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str
    use_tls: bool

    @classmethod
    def parse(cls, url: str) -> Target:
        """From an http or https URL; ConfigError if it is none."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is no URL of a server; give one such as http://localhost:8000")
        use_tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if use_tls else 80), parts.path or "/", use_tls)


class HttpPool:
    """Connections to one target, kept for later requests. Belongs to one event loop."""

    def __init__(self, target: Target, headers: Mapping[str, str]) -> None:
        self._target = target
        host = f"[{target.host}]" if ":" in target.host else target.host
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"host: {host}:{target.port}",
            "content-type: application/json",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._head = "\r\n".join(lines).encode("latin-1")
        self._tls = ssl.create_default_context() if target.use_tls else None
        self._address: str | None = None  # what the host's name led to
        self._idle: list[_Connection] = []

    async def post(self, body: bytes, on_body: OnBody) -> int:
        """Send `body`; `on_body` gets the answer's bytes with `time.perf_counter()`. Returns the status.

        Raises:
            HttpError: there is no whole answer.
        """
        request = b"%s\r\ncontent-length: %d\r\n\r\n%s" % (self._head, len(body), body)
        while self._idle:
            kept = self._idle.pop()
            # A server may close a connection that it has kept for long just as we use it.
            if kept.is_open and (status := await self._exchange(kept, request, on_body, may_be_stale=True)):
                return status
        status = await self._exchange(await self._connect(), request, on_body)
        assert status is not None
        return status

    def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        target, loop = self._target, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    _Connection,
                    self._address or target.host,
                    target.port,
                    ssl=self._tls,
                    server_hostname=target.host if self._tls else None,
                )
        except TimeoutError:
            raise HttpError(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise HttpError(f"cannot connect: {error}") from None
        self._address = connection.peer_address
        return connection

    async def _exchange(
        self, connection: _Connection, request: bytes, on_body: OnBody, *, may_be_stale: bool = False
    ) -> int | None:
        """The answer's status; None if nothing came back over a connection that may have been closed."""
        try:
            await connection.exchange(request, on_body)
        except HttpError:
            connection.close()
            if may_be_stale and connection.status is None:
                return None
            raise
        except BaseException:  # cancelled: the rest of the answer must not reach the next request
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return connection.status


class _Connection(asyncio.Protocol):
    """One exchange at a time."""

    status: int | None = None

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._on_body: OnBody = lambda data, time_s: None
        self._has_length = False  # else the end of the connection ends the answer
        self._now = 0.0  # when the bytes that are being parsed arrived

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def peer_address(self) -> str:
        assert self._transport is not None
        return str(self._transport.get_extra_info("peername")[0])

    async def exchange(self, request: bytes, on_body: OnBody) -> None:
        """Send a request; returns at the end of its answer."""
        assert self._transport is not None
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended, self._on_body, self.status, self._has_length = ended, on_body, None, False
        self._parser = httptools.HttpResponseParser(self)
        self._now = time.perf_counter()
        self._transport.write(request)
        while not ended.done():
            await asyncio.wait((ended,), timeout=_IDLE_TIMEOUT_S)
            if not ended.done() and time.perf_counter() - self._now >= _IDLE_TIMEOUT_S:
                raise HttpError(f"the server sent nothing for {_IDLE_TIMEOUT_S:g} s")
        ended.result()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------- of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._ended is None or self._ended.done():
            self.close()  # bytes that nobody has asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # raised by whoever reads the body
            self._end(HttpError(f"the answer is not what OpenAI's API sends: {error.__context__!r}"))
        except httptools.HttpParserError as error:
            self._end(HttpError(f"the answer is no HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if error is None and self.status is not None and not self._has_length:
            self._end(None)
        self._end(HttpError(f"the connection was lost{f': {error}' if error else ''}"))

    # ------------------------------------------------------------------------- of httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._on_body(data, self._now)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._end(None)

    def _end(self, error: HttpError | None) -> None:
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)
