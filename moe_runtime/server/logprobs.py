"""Logprobs in the shapes of the two routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_runtime.request import Logprob, PromptLogprobs
from moe_runtime.server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from moe_runtime.server.protocol.completions import CompletionLogprobs
from moe_runtime.tokenizer import Tokenizer

# What OpenAI gives for a token that cannot be; JSON has no infinity.
_LOWEST = -9999.0

OfToken = dict[int, Logprob]


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[OfToken], num_top: int
) -> ChatLogprobs:
    """One entry for each of `token_ids`, with the `num_top` best tokens at its position."""
    content = []
    for token_id, of_token in zip(token_ids, logprobs, strict=True):
        best = sorted(of_token.items(), key=lambda item: -item[1].logprob)[:num_top]
        sampled = _top(tokenizer, token_id, of_token[token_id])
        content.append(
            TokenLogprob(
                token=sampled.token,
                logprob=sampled.logprob,
                bytes=sampled.bytes,
                top_logprobs=[_top(tokenizer, other, logprob) for other, logprob in best],
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[OfToken], offset: int
) -> CompletionLogprobs:
    """Columns with an entry for each of `token_ids`; `offset` is where the first begins in the choice's text."""
    columns = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, of_token in zip(token_ids, logprobs, strict=True):
        sampled = of_token[token_id]
        columns.text_offset.append(offset)
        columns.token_logprobs.append(_finite(sampled.logprob))
        columns.tokens.append(_text(sampled))
        columns.top_logprobs.append({_text(entry): _finite(entry.logprob) for entry in of_token.values()})
        offset += len(columns.tokens[-1])
    return columns


def prompt_columns(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: PromptLogprobs
) -> CompletionLogprobs:
    """Like `completion_logprobs` for an echoed prompt, whose first token nothing predicts."""
    first = tokenizer.token(token_ids[0])
    predicted = [of_token for of_token in logprobs if of_token is not None]
    rest = completion_logprobs(token_ids[1:], predicted, len(first))
    return CompletionLogprobs(
        text_offset=[0, *rest.text_offset],
        token_logprobs=[None, *rest.token_logprobs],
        tokens=[first, *rest.tokens],
        top_logprobs=[None, *rest.top_logprobs],
    )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The columns of two stretches of text that follow each other."""
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )


def prompt_logprobs(logprobs: PromptLogprobs) -> list[dict[str, Any] | None]:
    """vLLM's field: for each token of the prompt, logprob, rank and text by token id."""
    return [
        None
        if of_token is None
        else {
            str(token_id): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in of_token.items()
        }
        for of_token in logprobs
    ]


def _top(tokenizer: Tokenizer, token_id: int, entry: Logprob) -> TopLogprob:
    text = _text(entry)
    as_bytes = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    return TopLogprob(
        token=text,
        logprob=_finite(entry.logprob),
        bytes=list(text.encode() if as_bytes is None else as_bytes),
    )


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
