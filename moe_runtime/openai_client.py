"""OpenAIClient: asks any server that speaks OpenAI's HTTP API, and says in one line what went wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import httpx2

from moe_runtime.errors import ConfigError, ServerError

_CONNECT_TIMEOUT_S = 10.0
# Between two pieces of an answer: a long prompt may keep the first one waiting.
_READ_TIMEOUT_S = 600.0


class OpenAIClient:
    """A connection to one server; every method raises ServerError for what goes wrong, ConfigError for a bad URL."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            base_url: with its `/v1`.
            transport: instead of the network.
        """
        self._base_url = base_url.rstrip("/")
        try:
            self._http = httpx2.Client(
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx2.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
                transport=transport,
            )
        except (ValueError, UnicodeError) as error:
            raise ServerError(f"the API key cannot be sent in an HTTP header: {error}") from None

    def models(self) -> list[str]:
        """What the server calls its models."""
        with self._explained():
            response = self._http.get(f"{self._base_url}/models")
        self._check(response)
        try:
            names = [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise ServerError(
                f"{self._base_url}/models answers with something else than OpenAI's list of models; "
                "is the base URL right? it usually ends in /v1"
            ) from None
        if not names:
            raise ServerError(f"{self._base_url} serves no model")
        return names

    def stream(self, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """POST `body` to a route such as "/chat/completions" with `stream` set; yields the answer's chunks."""
        request = {**body, "stream": True}
        with (
            self._explained(),
            self._http.stream("POST", f"{self._base_url}{route}", json=request) as response,
        ):
            if not response.is_success:
                response.read()
            self._check(response)
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                yield self._parse(event.data)
        raise ServerError(f"{self._base_url} ended the stream before the answer was complete")

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the connection into ours."""
        try:
            yield
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ConfigError(
                f"{self._base_url!r} is no URL of a server ({error}); give one such as http://localhost:8000/v1"
            ) from None
        except httpx2.ConnectTimeout:
            raise ServerError(f"no answer from {self._base_url} within {_CONNECT_TIMEOUT_S:g} s") from None
        except httpx2.ConnectError as error:
            raise ServerError(
                f"no server answers at {self._base_url} ({error}); start one with `moe-runtime serve`, or give "
                "the right --base-url"
            ) from None
        except httpx2.TimeoutException:
            raise ServerError(f"{self._base_url} sent nothing for {_READ_TIMEOUT_S:g} s") from None
        except httpx2.SSEError as error:
            raise ServerError(f"{self._base_url} answers with no event stream: {error}") from None
        except httpx2.TransportError as error:
            raise ServerError(f"the connection to {self._base_url} was lost: {error}") from None

    def _check(self, response: httpx2.Response) -> None:
        """Raise what an error status says."""
        status = response.status_code
        if response.is_success:
            return
        message = _error_message(response)
        if status in (401, 403):
            raise ServerError(
                f"{self._base_url} refuses the API key ({status}: {message}); give --api-key, or set "
                "MOE_RUNTIME_API_KEY or OPENAI_API_KEY"
            )
        raise ServerError(f"{response.url} answers {status}: {message}")

    def _parse(self, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError:
            raise ServerError(f"{self._base_url} sent an event that is no JSON: {data[:200]!r}") from None
        if not isinstance(chunk, dict):
            raise ServerError(f"{self._base_url} sent an event that is no JSON object: {data[:200]!r}")
        if error := chunk.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            raise ServerError(f"{self._base_url} ended the answer: {message}")
        return chunk


def _error_message(response: httpx2.Response) -> str:
    """OpenAI's error message, or the beginning of whatever else the body holds, on one line."""
    text = response.text
    with contextlib.suppress(ValueError):
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        text = str(message) if message else text
    return " ".join(text.split())[:500] or response.reason_phrase
