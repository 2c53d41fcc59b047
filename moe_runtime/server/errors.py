"""What a client is told when something is wrong: OpenAI's error object, its status, and never a stack trace."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from moe_runtime.errors import MoeRuntimeError, QueueFullError, UserError

RETRY_AFTER_S = 1
_RETRY = {"retry-after": str(RETRY_AFTER_S)}


class ApiError(Exception):
    """An answer with an error status; raised anywhere in a handler, also in mid-stream."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            kind: OpenAI's `type`.
            param: the request's field that is at fault.
            code: a word for programs, such as "context_length_exceeded".
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def too_busy(message: str, code: str) -> ApiError:
    """429: the same request may be served a little later."""
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=_RETRY)


def unavailable(message: str, code: str) -> ApiError:
    """503: the server serves nobody now."""
    return ApiError(503, message, kind="service_unavailable", code=code, headers=_RETRY)


def internal_error(request_id: str) -> ApiError:
    """500: a fault of ours; the log has the rest under the request's id."""
    return ApiError(
        500,
        f"the server failed on this request; its log says why under request id {request_id}",
        kind="server_error",
        code="internal_error",
    )


def as_api_error(error: Exception) -> ApiError | None:
    """What a client is told of `error`; None for one that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return too_busy(str(error), "queue_full")
    if isinstance(error, UserError):
        return bad_request(str(error), _param_of(str(error)))
    if isinstance(error, MoeRuntimeError):
        # Its message may hold a rank's traceback and addresses: these are for the log.
        return unavailable("the model's ranks have failed and serve no requests now", "engine_dead")
    return None


def _param_of(message: str) -> str | None:
    """The field that a ConfigError or PromptError speaks of: its messages begin with the name."""
    if message.startswith("the prompt"):
        return "prompt"
    found = _FIELD.match(message)
    if found is None:
        return None
    name = found.group(1)
    return found.group() if "_" in name or name in _SINGLE_WORD_FIELDS else None


_FIELD = re.compile(r"([a-z]\w*)[\w.\[\]]*(?=\s)", re.ASCII)
_SINGLE_WORD_FIELDS = frozenset({"n", "temperature", "seed", "stop", "logprobs", "messages", "priority"})
