"""Parts of answers that several routes share. Answers are msgspec structs: a stream encodes one for every step."""

from __future__ import annotations

from typing import Any

import msgspec


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Of the prompts' tokens."""

    cached_tokens: int  # found in the prefix cache


class Usage(msgspec.Struct, kw_only=True):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class ModelCard(msgspec.Struct, kw_only=True):
    """One name of the model in /v1/models."""

    id: str
    object: str = "model"
    created: int  # seconds since the epoch
    owned_by: str = "moe_runtime"
    root: str
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


def encode(answer: Any) -> bytes:
    """JSON; fields that are UNSET stay out."""
    return msgspec.json.encode(answer)
