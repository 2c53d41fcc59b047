"""The seam for structured output: what `response_format` and `structured_outputs` ask of the sampler."""

from __future__ import annotations

from typing import Any

from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.server.errors import bad_request
from moe_runtime.server.protocol.sampling import GenerationRequest
from moe_runtime.structured_outputs import StructuredOutputsParams

_FORMATS = ("text", "json_object", "json_schema")


def wanted_structure(request: GenerationRequest) -> dict[str, Any] | None:
    """Fields of the sampler's structured outputs (json, json_object, regex, choice, grammar); None for free text.

    Raises:
        ApiError: 400, the format is unknown, or two of them are asked for.
    """
    structure = dict(request.structured_outputs or {})
    if request.response_format is None:
        return structure or None
    wanted = _of_response_format(request.response_format)
    if wanted and structure:
        raise bad_request(
            "response_format and structured_outputs both constrain the output; send one of them",
            "response_format",
        )
    return wanted or structure or None


def structure_params(request: GenerationRequest) -> dict[str, Any]:
    """Sampling parameters that make the output keep to the structure; empty for free text.

    Raises:
        ApiError: 400, as `wanted_structure`, or for fields that cannot be served.
    """
    structure = wanted_structure(request)
    if structure is None:
        return {}
    try:
        return {"structured_outputs": StructuredOutputsParams(**structure)}
    except ConfigError as error:
        param = "response_format" if request.structured_outputs is None else "structured_outputs"
        raise bad_request(str(error), param) from error


def _of_response_format(response_format: dict[str, Any]) -> dict[str, Any]:
    kind = response_format.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise bad_request(
                "response_format.json_schema.schema must be a JSON schema (an object)",
                "response_format.json_schema",
            )
        return {"json": schema}
    raise bad_request(
        f"response_format.type must be one of {', '.join(_FORMATS)}, got {kind!r:.60}"
        f"{did_you_mean(str(kind)[:60], _FORMATS)}",
        "response_format.type",
    )
