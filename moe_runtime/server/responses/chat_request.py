"""A request of the Responses API as the chat request that it stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moe_runtime.errors import did_you_mean
from moe_runtime.server.errors import ApiError, bad_request
from moe_runtime.server.protocol.chat import ChatCompletionRequest
from moe_runtime.server.protocol.responses import INCLUDABLE, LOGPROBS, ResponsesRequest
from moe_runtime.server.protocol.sampling import SamplingFields
from moe_runtime.server.responses.conversation import messages_of

_FORMATS = ("text", "json_object", "json_schema")
_CHOICES = ("none", "auto", "required")
# Values that change nothing in an answer; reasoning is given whole and never summed up.
_REASONING: dict[str, Collection[Any]] = {
    "effort": (None, "medium"),
    "summary": (None, "auto"),
    "generate_summary": (None, "auto"),
}
_TEXT: dict[str, Collection[Any]] = {"verbosity": (None, "medium")}
_INSTEAD = {
    "reasoning.effort": 'use chat_template_kwargs, such as {"enable_thinking": false}',
    "reasoning.summary": "reasoning is given whole",
    "reasoning.generate_summary": "reasoning is given whole",
    "text.verbosity": "say in instructions how long the answer should be",
}
# What the parts that chat shares call by the names of its own fields.
_NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}


def chat_request(request: ResponsesRequest) -> ChatCompletionRequest:
    """Ask for the same of the chat.

    Raises:
        ApiError: 400, a field has not its shape, or asks for what the server does not do.
    """
    _check(request)
    response_format = _response_format(request.text or {})
    if response_format and request.structured_outputs:
        raise bad_request(
            "text.format and structured_outputs both constrain the output; send one of them", "text.format"
        )
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or [])]
    shared = {name: getattr(request, name) for name in SamplingFields.model_fields}
    return ChatCompletionRequest(
        **shared,
        messages=messages_of(request.input, request.instructions),
        max_completion_tokens=request.max_output_tokens,
        logprobs=LOGPROBS in (request.include or []),
        top_logprobs=request.top_logprobs,
        tools=tools or None,
        tool_choice=_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=response_format,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def in_our_names(error: ApiError) -> ApiError:
    """An error about a chat's field, now about the field that it came from."""
    error.param = _NAMES.get(error.param or "", error.param)
    return error


def _check(request: ResponsesRequest) -> None:
    if request.background:
        raise _unsupported("background", "the server keeps no answers; use stream, or wait for the answer")
    if request.truncation not in (None, "disabled"):
        raise _unsupported(
            "truncation", f"it must be 'disabled', got {request.truncation!r:.60}; shorten the input"
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    for index, name in enumerate(request.include or []):
        if name not in INCLUDABLE:
            raise bad_request(
                f"include[{index}] must be one of {', '.join(INCLUDABLE)}, got {name!r:.60}"
                f"{did_you_mean(name[:60], INCLUDABLE)}",
                f"include[{index}]",
            )
    if request.top_logprobs and LOGPROBS not in (request.include or []):
        raise bad_request(f"top_logprobs needs include to hold {LOGPROBS!r}", "top_logprobs")
    _check_harmless("reasoning", request.reasoning or {}, _REASONING)
    _check_harmless("text", {k: v for k, v in (request.text or {}).items() if k != "format"}, _TEXT)


def _check_harmless(where: str, given: Mapping[str, Any], harmless: Mapping[str, Collection[Any]]) -> None:
    for name, value in given.items():
        field = f"{where}.{name:.60}"
        if name not in harmless:
            raise bad_request(
                f"unknown field {field!r}{did_you_mean(name[:60], harmless)}", field, code="unknown_parameter"
            )
        if value not in harmless[name]:
            raise _unsupported(field, f"{_INSTEAD[field]}; got {value!r:.60}")


def _unsupported(name: str, why: str) -> ApiError:
    return bad_request(f"{name} is not supported: {why}", name, code="unsupported_parameter")


def _response_format(text: dict[str, Any]) -> dict[str, Any] | None:
    """Chat nests what is flat here."""
    wanted = text.get("format")
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in _FORMATS:
        raise bad_request(
            f"text.format.type must be one of {', '.join(_FORMATS)}, got {kind!r:.60}"
            f"{did_you_mean(str(kind)[:60], _FORMATS)}",
            "text.format.type",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": kind}
    described = {name: value for name, value in wanted.items() if name != "type"}
    if not isinstance(described.get("schema"), dict):
        raise bad_request("text.format.schema must be a JSON schema (an object)", "text.format.schema")
    return {"type": kind, "json_schema": described}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise bad_request(
            f"{where}.type must be 'function', got {kind!r:.60}; other tools are not run here",
            f"{where}.type",
            code="unsupported_parameter",
        )
    if not isinstance(tool.get("name"), str):
        raise bad_request(f"{where}.name must be a string, got {tool.get('name')!r:.60}", f"{where}.name")
    given = ("name", "description", "parameters", "strict")
    return {"type": kind, "function": {name: tool[name] for name in given if tool.get(name) is not None}}


def _tool_choice(choice: object, tools: list[dict[str, Any]]) -> str | dict[str, Any] | None:
    if choice == "auto" and not tools:
        return None  # the API's default, which clients send also where there are no tools
    if choice is None or (isinstance(choice, str) and choice in _CHOICES):
        return choice
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise bad_request(
            f'tool_choice must be one of {", ".join(_CHOICES)} or {{"type": "function", "name": ...}}, '
            f"got {choice!r:.80}",
            "tool_choice",
        )
    names = [tool["function"]["name"] for tool in tools]
    name = choice.get("name")
    if name not in names:
        raise bad_request(
            f"tool_choice.name must be one of tools, got {name!r:.60}{did_you_mean(str(name)[:60], names)}",
            "tool_choice.name",
        )
    return {"type": "function", "function": {"name": name}}
