"""What every request passes on its way to a handler: an id, the API key, admission, the limit of its body."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.server.admission import Admission
from moe_runtime.server.errors import ApiError
from moe_runtime.server.http import ClientLeftError, error_answer, explain

# What anybody may ask: probes, scrapers, and the page that asks for the key.
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/version"})
OPEN_FOLDER = "/page/"  # the page's files

# Of a body over the limit this much is still read, so that a client that is still sending hears the answer.
_MAX_DISCARDED_BYTES = 64 * 2**20

_CLIENTS_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestScope:
    """Outermost: gives the request an id and its time of arrival, and lets no exception out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _CLIENTS_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "id": request_id, "arrival_time": time.monotonic()}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientLeftError:
            return
        except Exception as error:
            answer = error_answer(explain(error, request_id))
            if not started:
                await answer(scope, receive, send_with_id)


class ApiKeys:
    """Refuses requests that do not bring one of the keys, except for what anybody may ask."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            self._check(Headers(scope=scope).get("authorization"))
        await self._app(scope, receive, send)

    def _check(self, authorization: str | None) -> None:
        scheme, _, given = (authorization or "").partition(" ")
        token = given.strip().encode("latin-1", "replace")
        # Every key is compared, so that the time tells nothing of which one nearly matched.
        matches = [hmac.compare_digest(token, key) for key in self._keys]
        if scheme.lower() == "bearer" and any(matches):
            return
        what = "wrong" if authorization else "missing"
        raise ApiError(
            401,
            f"the API key is {what}; send it as 'Authorization: Bearer KEY'",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


class Admitted:
    """Counts POST requests from here to the end of their answers; refuses those that are too many."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        self._admission.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.leave()


class BodyLimit:
    """Ends the reading of a body that is too large, whether or not its length was announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            if headers.get("expect", "").lower() != "100-continue":  # else the body waits for our word
                await _discard(receive)
            raise self._too_large(announced)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                if message.get("more_body"):
                    await _discard(receive)
                raise self._too_large(f"more than {self._max_bytes}")
            return message

        await self._app(scope, counted, send)

    def _too_large(self, size: str) -> ApiError:
        return ApiError(
            413,
            f"the body has {size} bytes, at most {self._max_bytes} are taken; send less, or raise "
            "--max-body-bytes",
            code="body_too_large",
            headers={"connection": "close"},
        )


async def _discard(receive: Receive) -> None:
    num_bytes = 0
    while num_bytes < _MAX_DISCARDED_BYTES:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if not message.get("more_body"):
            return
