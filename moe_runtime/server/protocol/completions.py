"""/v1/completions: the request, its answer, and the chunks of a stream."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator

from moe_runtime.server.protocol.answers import Usage
from moe_runtime.server.protocol.sampling import REFUSED, GenerationRequest, Int64

_SHAPES = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _checked_prompts(prompt: object) -> list[str | list[int]]:
    """One entry a prompt, whatever shape they came in."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise ValueError(f"{_SHAPES}, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError("is an empty list; give at least one prompt")
    if type(prompt[0]) is int:
        return [_checked_ids(prompt)]
    if isinstance(prompt[0], str):
        for index, text in enumerate(prompt):
            if not isinstance(text, str):
                raise ValueError(f"{_SHAPES}, got {type(text).__name__} at index {index} among strings")
        return list(prompt)
    return [_checked_ids(ids) for ids in prompt]


def _checked_ids(ids: object) -> list[int]:
    if not isinstance(ids, list):
        raise ValueError(f"{_SHAPES}, got {type(ids).__name__} in a list")
    for index, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise ValueError(f"{_SHAPES}, got {type(token_id).__name__} at index {index} of token ids")
    return ids


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    refused: ClassVar[dict[str, str]] = {
        **REFUSED,
        "suffix": "the model only continues text; put what comes after into the prompt",
        "prompt_embeds": "prompts are text or token ids",
    }

    prompt: Annotated[list[Any], BeforeValidator(_checked_prompts)]
    max_tokens: Int64 | None = None  # default 16; with echo 0 is allowed and nothing is generated
    echo: bool | None = None  # the prompt before the completion
    logprobs: Int64 | None = None  # of this many best tokens at each position
    add_special_tokens: bool | None = None  # those that the tokenizer puts around every text; default true


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Columns with an entry for each token."""

    text_offset: list[int]  # where the token begins in the choice's text
    token_logprobs: list[float | None]  # None for the first token of a prompt
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer, or a chunk of a stream: OpenAI gives both the same shape."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET
