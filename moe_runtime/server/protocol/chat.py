"""/v1/chat/completions: the request, its answer, and the chunks of a stream."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from moe_runtime.server.protocol.answers import Usage
from moe_runtime.server.protocol.sampling import REFUSED, GenerationRequest, Int64


class ChatFields(GenerationRequest):
    """What decides how a conversation becomes a prompt."""

    add_generation_prompt: bool | None = None  # open the assistant's turn; default true
    continue_final_message: bool | None = None  # go on with the last message, the assistant's
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template, such as enable_thinking
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None  # "auto", "none", "required", or one function


class ChatCompletionRequest(ChatFields):
    """Body of /v1/chat/completions."""

    refused: ClassVar[dict[str, str]] = {
        **REFUSED,
        "audio": "the model takes and gives text only",
        "prediction": "every token is generated",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "web_search_options": "the model has no access to the web",
        "verbosity": "say in a message how long the answer should be",
        "reasoning_effort": 'use chat_template_kwargs, such as {"enable_thinking": false}',
        "chat_template": "requests use the server's template; start the server with --chat-template",
        "moderation": "answers are not moderated",
    }

    messages: list[dict[str, Any]]
    max_tokens: Int64 | None = None  # the older name of the next
    max_completion_tokens: Int64 | None = None  # default: as many as the model's length allows
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    modalities: list[str] | None = None  # only ["text"]
    parallel_tool_calls: bool | None = None


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, kw_only=True):
    """A token that was sampled, and the best ones at its position."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """What is called, and with what; in a stream the name comes first and the arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(msgspec.Struct, kw_only=True):
    """A call, or a piece of it in a stream; only pieces carry the index."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionCall


class ChatMessage(msgspec.Struct, kw_only=True):
    """The assistant's whole message."""

    role: str = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    """What is new in a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer to the conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """A piece of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
