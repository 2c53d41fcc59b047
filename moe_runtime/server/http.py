"""The plumbing between ASGI and handlers: bodies in, JSON and event streams out, clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic_core import from_json
from starlette.types import Receive, Scope, Send

from moe_runtime.server.errors import ApiError, as_api_error, bad_request, internal_error
from moe_runtime.server.protocol.answers import encode

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientLeftError(Exception):
    """The client closed its connection, or takes nothing from it: nobody is left to answer."""


def event(data: bytes) -> bytes:
    """One server-sent event; JSON has no line breaks of its own."""
    return b"data: " + data + b"\n\n"


def json_answer(answer: Any, status: int = 200) -> Response:
    """A struct as a response."""
    return Response(encode(answer), status_code=status, media_type="application/json")


def error_answer(error: ApiError) -> Response:
    """An error as a response."""
    return Response(
        error.body(), status_code=error.status, headers=error.headers, media_type="application/json"
    )


async def read_json(request: Request, timeout_s: float) -> Any:
    """The body, parsed.

    Raises:
        ApiError: it is no JSON (400, or 415 where it says so itself), or does not arrive in time (408).
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    # A browser sends other kinds to any server for any page, without asking the server first.
    if kind != "application/json":
        raise ApiError(
            415, f"the body must be application/json, got {kind!r:.80}", code="unsupported_media_type"
        )
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="body_timeout") from None
    if not body:
        raise bad_request("the body is empty; it must be a JSON object")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientLeftError: it has left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of server-sent events, whose first piece is known before the headers go out."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], *, request_id: str, send_timeout_s: float
    ) -> None:
        """
        Args:
            rest: further pieces, each one or more whole events. An error that it raises becomes an event, and
                the stream's last.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._request_id = request_id
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send_piece(send, self._first)
        try:
            async for piece in self._rest:
                await self._send_piece(send, piece)
        except ClientLeftError:
            raise
        except Exception as error:
            await self._send_piece(send, event(explain(error, self._request_id).body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, send: Send, piece: bytes) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            raise ClientLeftError from None


def explain(error: Exception, request_id: str) -> ApiError:
    """What the client is told of any error; what it is not told goes to the log."""
    known = as_api_error(error)
    if known is None:
        logger.error("request %s failed", request_id, exc_info=error)
        return internal_error(request_id)
    if known.status >= 500 and known is not error:
        logger.error("request %s: %s", request_id, error)
    return known
