"""RequestModel: a JSON body checked field by field, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_runtime.errors import did_you_mean
from moe_runtime.server.errors import ApiError, bad_request

# Sent by OpenAI's clients as a matter of course; they label or bill a request and change nothing in its answer.
TOLERATED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


class StrictModel(BaseModel):
    """An object inside a body: known fields only, of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RequestModel(StrictModel):
    """A whole body. `parse` makes one; null stands for a field that is absent."""

    # Fields that clients know and whose effect we cannot give: why, and what to do instead.
    refused: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, data: object) -> Self:
        """Check a parsed JSON body.

        Raises:
            ApiError: status 400, naming the field that is at fault.
        """
        if not isinstance(data, dict):
            raise bad_request(f"the body must be a JSON object, got {_short(data)}")
        known = {name: value for name, value in data.items() if cls._is_kept(name, value)}
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            raise _explain(error) from None

    @classmethod
    def _is_kept(cls, name: str, value: object) -> bool:
        """Whether a field is ours (and given); raises ApiError for one that nobody may send."""
        if name in cls.model_fields:
            return value is not None
        if name in TOLERATED:
            return False
        if name in cls.refused:
            if value is None:
                return False
            raise bad_request(
                f"{name} is not supported: {cls.refused[name]}", name, code="unsupported_parameter"
            )
        name = name[:80]
        raise bad_request(
            f"unknown field {name!r}{did_you_mean(name, cls.model_fields)}", name, code="unknown_parameter"
        )


def _explain(error: ValidationError) -> ApiError:
    """The first thing that is wrong, as one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return bad_request(f"{param} is missing", param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {param!r}", param, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return bad_request(f"{param}: {message}", param, code="invalid_value")
    return bad_request(f"{param}: {message}, got {_short(first['input'])}", param, code="invalid_type")


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") becomes messages[0].role."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:200] or "body"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
