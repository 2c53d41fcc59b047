"""Connections that uvicorn serves, guarded against clients that are slow, wordy, or gone."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from moe_runtime.server.errors import ApiError, bad_request

MAX_HEAD_BYTES = 64 * 1024  # of a request's line and headers
HEAD_TIMEOUT_S = 60.0  # from a connection's beginning, or a request's, to the end of its head


class _HeadTooLargeError(Exception):
    """Raised inside of the parser, which then refuses the request as malformed."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        self._cycles: list[RequestResponseCycle] = []  # requests that may still be at work
        self._in_body = False
        self._num_head_bytes = 0  # of the head that is arriving
        self._timer: asyncio.TimerHandle | None = None
        self._timed: RequestResponseCycle | None = None  # the request before the one whose head is expected
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request: uvicorn tells the last one only, and there are several where they were pipelined."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the head has grown too large."""
        before = self.cycle
        in_head = not self._in_body and (before is None or before.response_complete)
        self._num_head_bytes += len(data) if in_head else 0
        super().data_received(data)
        if self.cycle is not before:
            self._num_head_bytes = 0
        elif in_head and not self.transport.is_closing():
            self._expect_head()
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """A head begins."""
        self._num_field_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after a body in chunks."""
        self._num_field_bytes += len(name) + len(value)
        if self._num_field_bytes > MAX_HEAD_BYTES:
            self._num_head_bytes = self._num_field_bytes
            raise _HeadTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request goes to the application."""
        self._in_body = True
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete] + [self.cycle]

    def on_message_complete(self) -> None:
        """The body has ended."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the shape of every other error."""
        if any(cycle.response_started and not cycle.response_complete for cycle in self._cycles):
            self.transport.close()  # a second answer would be taken for a part of the first
        if self.transport.is_closing():
            return
        if self._num_head_bytes > MAX_HEAD_BYTES:
            error = ApiError(
                431, f"the request's headers have more than {MAX_HEAD_BYTES} bytes", code="headers_too_large"
            )
        else:
            error = bad_request("this is no valid HTTP request", code="invalid_http")
        body = error.body()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _expect_head(self) -> None:
        if self._timer is not None:
            if self._timed is self.cycle:
                return
            self._timer.cancel()
        self._timed = self.cycle
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_overdue)

    def _head_overdue(self) -> None:
        self._timer = None
        if self.cycle is self._timed and not self.transport.is_closing():
            self.transport.close()
