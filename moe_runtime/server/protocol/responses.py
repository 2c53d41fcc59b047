"""/v1/responses: the request, and the answer with its items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field

from moe_runtime.server.protocol.base import StrictModel
from moe_runtime.server.protocol.chat import TokenLogprob
from moe_runtime.server.protocol.sampling import REFUSED, Int64, SamplingFields

LOGPROBS = "message.output_text.logprobs"
# What `include` may name. Only LOGPROBS adds something: the others are of tools that are refused, or stand in for
# what an answer holds anyway (reasoning is given as text).
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)

_KEEPS_NOTHING = "the server keeps no answers; send the whole conversation as input"


def _checked_input(given: object) -> object:
    # Here, since the errors of a union would name its kinds as if they were fields.
    if not isinstance(given, str | list):
        raise ValueError(f"must be a string or a list of items, got {type(given).__name__}")
    if isinstance(given, list):
        for index, item in enumerate(given):
            if not isinstance(item, dict):
                raise ValueError(f"must hold objects, got {type(item).__name__} at index {index}")
    return given


class ResponsesStreamOptions(StrictModel):
    """What a stream says besides its events."""

    include_obfuscation: bool | None = None  # accepted; events are not padded


class ResponsesRequest(SamplingFields):
    """Body of /v1/responses."""

    refused: ClassVar[dict[str, str]] = {
        **REFUSED,
        "previous_response_id": _KEEPS_NOTHING,
        "conversation": _KEEPS_NOTHING,
        "prompt": "the server keeps no prompts; send it as instructions and input",
        "context_management": "shorten the input before it is sent",
        "moderation": "answers are not moderated",
        "messages": "this route takes input",
        "max_tokens": "use max_output_tokens",
        "max_completion_tokens": "use max_output_tokens",
        "response_format": "use text.format",
        "reasoning_effort": 'use chat_template_kwargs, such as {"enable_thinking": false}',
        "logprobs": f"put {LOGPROBS!r} into include",
        "n": "a response is one answer; send the request several times",
        "functions": "use tools",
    }

    input: Annotated[str | list[dict[str, Any]], BeforeValidator(_checked_input)]
    instructions: str | None = None  # a system message before the input
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = (
        None  # default: all that the model's length allows
    )
    max_tool_calls: Int64 | None = None  # of built-in tools, which there are none of
    stream_options: ResponsesStreamOptions | None = None
    text: dict[str, Any] | None = None  # format, verbosity
    reasoning: dict[str, Any] | None = None  # only what changes nothing
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None  # "auto", "none", "required", or one function
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: Int64 | None = None
    truncation: str | None = None  # only "disabled"
    background: bool | None = None  # only false
    store: bool | None = None  # accepted; nothing is kept
    metadata: dict[str, str] | None = None  # given back
    user: str | None = None  # given back
    chat_template_kwargs: dict[str, Any] | None = None


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, kw_only=True):
    """What the assistant says."""

    type: str = "output_text"
    text: str = ""
    annotations: Sequence[None] = ()
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True):
    """What the model thinks."""

    type: str = "reasoning_text"
    text: str = ""


class MessageItem(msgspec.Struct, kw_only=True):
    """The assistant's message."""

    id: str
    type: str = "message"
    role: str = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = []


class ReasoningItem(msgspec.Struct, kw_only=True):
    """The reasoning before a message or a call."""

    id: str
    type: str = "reasoning"
    status: Status = "in_progress"
    summary: Sequence[None] = ()
    content: list[ReasoningText] = []
    encrypted_content: None = None


class FunctionCallItem(msgspec.Struct, kw_only=True):
    """A call of one of the request's functions."""

    id: str
    type: str = "function_call"
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the prompt's tokens."""

    cached_tokens: int  # found in the prefix cache
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the generated tokens."""

    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct, kw_only=True):
    """Tokens that a request took, in this route's names."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True):
    """Why a stream broke off."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why an answer ends too early."""

    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer, and in a stream what there is of it; it repeats the request's settings."""

    id: str
    object: str = "response"
    created_at: int  # seconds since the epoch
    status: Status
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, Any]
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None | UnsetType = UNSET
    metadata: dict[str, str]
