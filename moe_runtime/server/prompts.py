"""From what a client sends to what the engine takes: the model's name, token ids, room for the output."""

from __future__ import annotations

import asyncio

from moe_runtime.errors import did_you_mean
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.errors import ApiError, bad_request
from moe_runtime.tokenizer import Tokenizer

# Characters that are tokenized on the event loop in well under a millisecond; longer texts go to a thread.
_SHORT_TEXT = 4096
_CHARS_A_TOKEN = 8  # more than any language has on average
_CUT_TOKENS = 64


def served_name(name: str | None, config: ServerConfig) -> str:
    """The model's name for the answer; the first served one where the request has none.

    Raises:
        ApiError: 404, no model of that name is served.
    """
    names = config.served_model_names
    if name is None:
        return names[0]
    if name in names:
        return name
    known = ", ".join(map(repr, names))
    raise ApiError(
        404,
        f"the model {name!r:.200} does not exist{did_you_mean(name[:200], names)}; served here: {known}",
        kind="not_found_error",
        param="model",
        code="model_not_found",
    )


async def encode(
    tokenizer: Tokenizer,
    text: str,
    *,
    add_special_tokens: bool,
    max_model_len: int | None = None,
    param: str = "prompt",
) -> list[int]:
    """Token ids of `text`, without holding up other requests.

    Raises:
        ApiError: 400, it is far longer than `max_model_len`; what is but a little too long comes back.
    """
    if len(text) <= _SHORT_TEXT:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(_encode_long, tokenizer, text, add_special_tokens, max_model_len, param)


def _encode_long(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_model_len: int | None, param: str
) -> list[int]:
    # While a text is encoded it takes 150 times its size. Its beginning may be enough to refuse it.
    if max_model_len is not None:
        num_chars = max(_SHORT_TEXT, _CHARS_A_TOKEN * max_model_len)
        while num_chars < len(text):
            # The cut may make a few tokens of what is one.
            num_tokens = len(tokenizer.encode(text[:num_chars], False)) - _CUT_TOKENS
            if num_tokens > max_model_len:
                raise bad_request(
                    f"the model's context length is {max_model_len} tokens and the prompt has more than "
                    f"{num_tokens}; shorten it to {max_model_len - 1} at most, so that one is left for the output",
                    param,
                    code="context_length_exceeded",
                )
            num_chars *= 4
    return tokenizer.encode(text, add_special_tokens)


def room_for_output(
    num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, *, default: int | None, param: str
) -> int:
    """Tokens that may be generated: what was asked for, else `default` or as many as there is room for.

    Raises:
        ApiError: 400, prompt and output together are longer than the model allows.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise bad_request(
            f"the model's context length is {max_model_len} tokens and the prompt has {num_prompt_tokens}; "
            f"shorten it to {max_model_len - 1} at most, so that one is left for the output",
            param,
            code="context_length_exceeded",
        )
    if max_tokens is None:
        return room if default is None else min(default, room)
    if max_tokens > room:
        raise bad_request(
            f"the model's context length is {max_model_len} tokens, but {num_prompt_tokens + max_tokens} were "
            f"asked for: {num_prompt_tokens} in the prompt and {max_tokens} in the output; shorten the prompt or "
            f"ask for {room} at most",
            param,
            code="context_length_exceeded",
        )
    return max_tokens
