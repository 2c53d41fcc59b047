"""What goes into a request and what comes out: prompts, outputs, and what driver and rank exchange."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

import msgspec

from moe_runtime.errors import ConfigError, PromptError, did_you_mean
from moe_runtime.sampling_params import GREEDY_TEMPERATURE, SamplingParams
from moe_runtime.structured_outputs import StructuredOutputsParams

__all__ = [
    "GREEDY_TEMPERATURE",
    "CompletionOutput",
    "EngineRequest",
    "FinishReason",
    "Logprob",
    "OutputDelta",
    "Prompt",
    "PromptInput",
    "PromptLogprobs",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "draw_seed",
    "parse_prompt",
    "stop_ids",
    "validate_prompt",
]

FinishReason = Literal["stop", "length", "abort"]

# --------------------------------------------------------------------------- prompts


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, and perhaps the text that they are of."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


PromptInput = str | list[int] | TextPrompt | TokensPrompt

_PROMPT_KEYS = ("prompt", "prompt_token_ids")
_PROMPT_SHAPES = 'a string, a list of token ids, {"prompt": text} or {"prompt_token_ids": [...]}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt whose shape has been checked: text, token ids, or both (the ids then count)."""

    text: str | None
    token_ids: tuple[int, ...] | None  # None: the text is still to be tokenized


def parse_prompt(prompt: object) -> Prompt:
    """Check the shape of one prompt as a user gave it; PromptError says what is wrong with it."""
    if isinstance(prompt, str):
        return Prompt(prompt, None)
    if isinstance(prompt, list | tuple):
        return Prompt(None, _checked_ids(prompt))
    if not isinstance(prompt, dict):
        raise PromptError(f"a prompt must be {_PROMPT_SHAPES}, got {type(prompt).__name__} {_short(prompt)}")
    for key in prompt:
        if key not in _PROMPT_KEYS:
            hint = did_you_mean(str(key), _PROMPT_KEYS) or f"; it has {_PROMPT_KEYS}"
            raise PromptError(f"a prompt has no key {key!r}{hint}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise PromptError(f"a prompt must be {_PROMPT_SHAPES}, got {_short(prompt)}")
    if text is not None and not isinstance(text, str):
        raise PromptError(
            f'"prompt" must be a string, got {_short(text)}; token ids go into "prompt_token_ids"'
        )
    if ids is not None and not isinstance(ids, list | tuple):
        raise PromptError(f'"prompt_token_ids" must be a list of token ids, got {_short(ids)}')
    return Prompt(text, None if ids is None else _checked_ids(ids))


def _checked_ids(ids: Sequence[object]) -> tuple[int, ...]:
    for index, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise PromptError(f"token ids must be integers, got {_short(token_id)} at index {index}")
    return tuple(ids)  # type: ignore[arg-type]


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def validate_prompt(
    token_ids: Sequence[int],
    vocab_size: int,
    max_model_len: int,
    params: SamplingParams,
    eos_token_ids: Sequence[int] = (),
) -> None:
    """Refuse what the model cannot serve: PromptError for the prompt, ConfigError for `params`."""
    if not token_ids:
        raise PromptError("the prompt is empty; give at least one token")
    if len(token_ids) >= max_model_len:
        raise PromptError(
            f"the prompt has {len(token_ids)} tokens, but the model's length is {max_model_len} and one "
            f"token must be left to generate; shorten it to {max_model_len - 1} tokens or raise max_model_len"
        )
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index, bad = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
        raise PromptError(
            f"the prompt has token id {bad} at index {index}, outside the vocabulary of {vocab_size} (0 to "
            f"{vocab_size - 1}); was it made with another model's tokenizer?"
        )
    if params.logit_bias:
        _validate_logit_bias(vocab_size, params, eos_token_ids)


def _validate_logit_bias(vocab_size: int, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
    bias = params.logit_bias or {}
    if max(bias) >= vocab_size:
        raise ConfigError(f"logit_bias has token id {max(bias)}, outside the vocabulary of {vocab_size}")
    forbidden = {token_id for token_id, value in bias.items() if value == -math.inf}
    if params.min_tokens:
        forbidden.update(i for i in stop_ids(params, eos_token_ids) if i < vocab_size)
    if len(forbidden) == vocab_size:
        raise ConfigError(
            f"logit_bias and min_tokens forbid all {vocab_size} tokens of the vocabulary; leave one to sample"
        )


# --------------------------------------------------------------------------- outputs


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural logarithm of a token's probability under the model, before any sampling parameter."""

    logprob: float
    rank: int | None = None  # 1 is the best; tokens that tie share a rank
    decoded_token: str | None = None


PromptLogprobs = list[dict[int, Logprob] | None]  # None for the first token, which nothing predicts


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt, complete or so far."""

    index: int  # which of the request's n completions
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = (
        None  # sum over the sampled tokens; None unless logprobs were asked for
    )
    logprobs: list[dict[int, Logprob]] | None = None  # one dict a token: the sampled token and the best ones
    finish_reason: FinishReason | None = None  # None while it goes on
    stop_reason: int | str | None = None  # the stop token or stop string; None for the end-of-text token

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the driver's `time.monotonic`."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    time_in_queue: float | None = (
        None  # seconds on the rank until it was first scheduled; of n samples the last
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What became of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache; None if it never ran


# --------------------------------------------------------------------------- between driver and rank


def stop_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """The tokens that end a request. A structured text ends with an end-of-text token even under ignore_eos."""
    ignored = params.ignore_eos and params.structured_outputs is None
    return frozenset(params.stop_token_ids or ()) | (frozenset() if ignored else set(eos_token_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One completion to compute, as the driver sends it to a rank; n=3 makes three of these."""

    request_id: str
    sample_index: int  # 0 to n - 1
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int  # of the whole request: the params' own, or one that the driver drew
    eos_token_ids: tuple[int, ...] = ()
    arrival_time: float = 0.0  # seconds of the driver's time.monotonic
    priority: int = 0  # the lower, the sooner; counts where the scheduling policy is "priority"
    stream_interval: int = 1  # tokens of a delta, after the first, which is one token's

    @property
    def key(self) -> tuple[str, int]:
        """What tells this completion from every other in flight."""
        return self.request_id, self.sample_index


class OutputDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new about one completion since the last delta, as a rank sends it back.

    A driver makes one for every token of every request, and a Struct takes a tenth of a dataclass's time.
    """

    request_id: str
    sample_index: int
    new_token_ids: tuple[int, ...] = ()
    text: str = ""  # text that the new tokens completed
    logprobs: tuple[dict[int, Logprob], ...] | None = None  # one dict a new token
    prompt_logprobs: PromptLogprobs | None = None  # sent once, with the first delta
    cumulative_logprob: float | None = None  # over the whole completion so far
    finish_reason: FinishReason | None = None  # set on the last delta
    stop_reason: int | str | None = None
    # Set on the first delta, if it ever ran: seconds between its coming to the rank and its being scheduled.
    time_in_queue: float | None = None
    num_cached_tokens: int | None = None  # set with it: prompt tokens found in the prefix cache


def draw_seed() -> int:
    """A seed for a request that has none: 63 random bits, kept with it so that it can be replayed."""
    return secrets.randbits(63)
