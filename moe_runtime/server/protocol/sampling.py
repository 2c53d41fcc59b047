"""What requests that generate have in common: how tokens are chosen, streamed and constrained."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from moe_runtime.request import SamplingParams
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.errors import bad_request
from moe_runtime.server.protocol.base import RequestModel, StrictModel

# Fields that become parameters of the same name, where they are given.
_PASSED_ON = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "prompt_logprobs",
)

REFUSED = {
    "best_of": "every choice is returned; use n",
    "use_beam_search": "sampling and greedy decoding are; use temperature 0",
    "length_penalty": "it belongs to beam search",
    "guided_json": 'use structured_outputs {"json": ...}',
    "guided_regex": 'use structured_outputs {"regex": ...}',
    "guided_choice": 'use structured_outputs {"choice": [...]}',
    "guided_grammar": 'use structured_outputs {"grammar": ...}',
    "bad_words": "use logit_bias to forbid tokens",
    "allowed_token_ids": "use logit_bias to forbid tokens",
    "truncate_prompt_tokens": "shorten the prompt before it is sent",
}


# Larger numbers mean nothing anywhere, and do not fit into what the ranks compute with.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]

# What a rank goes through for every token, or checks before the first.
_MAX_STOP_CHARS = 64 * 1024  # of all stop strings together
_MAX_TOKENS_NAMED = 4096  # by stop_token_ids, and by logit_bias


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class StreamOptions(StrictModel):
    """What a stream says besides its deltas."""

    include_usage: bool | None = None  # a last chunk with the usage and no choices
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk
    include_obfuscation: bool | None = None  # accepted; chunks are not padded


class SamplingFields(RequestModel):
    """Fields of every request that generates: how tokens are chosen, and when to stop."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: Seed | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    stop_token_ids: list[Int64] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int64 | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Int64 | None = None  # the lower, the sooner, where the scheduling policy is "priority"
    structured_outputs: dict[str, Any] | None = None


class GenerationRequest(SamplingFields):
    """What completions and chat have besides."""

    refused: ClassVar[dict[str, str]] = REFUSED

    stream_options: StreamOptions | None = None
    n: Int64 | None = None
    prompt_logprobs: Int64 | None = None
    return_token_ids: bool | None = None  # token ids beside the text
    response_format: dict[str, Any] | None = None

    @property
    def num_choices(self) -> int:
        """Choices of one prompt."""
        return 1 if self.n is None else self.n

    def check_limits(self, config: ServerConfig) -> None:
        """Refuse what would cost the server too much, or makes no sense together."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        if self.n is not None and self.n > config.max_n:
            raise bad_request(f"n must be at most {config.max_n}, got {self.n}", "n")
        if self.stop is not None and len(self.stop) > config.max_stop:
            raise bad_request(
                f"stop must hold at most {config.max_stop} strings, got {len(self.stop)}; "
                "raise --max-stop-strings if you need more",
                "stop",
            )
        self._check_sizes()
        check_logprobs("prompt_logprobs", self.prompt_logprobs, config)
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request(
                "prompt_logprobs are not given in a stream; leave stream out", "prompt_logprobs"
            )

    def _check_sizes(self) -> None:
        num_chars = sum(map(len, self.stop or ()))
        if num_chars > _MAX_STOP_CHARS:
            raise bad_request(
                f"stop must hold at most {_MAX_STOP_CHARS} characters in all, got {num_chars}", "stop"
            )
        for name in ("stop_token_ids", "logit_bias"):
            num_tokens = len(getattr(self, name) or ())
            if num_tokens > _MAX_TOKENS_NAMED:
                raise bad_request(
                    f"{name} must name at most {_MAX_TOKENS_NAMED} tokens, got {num_tokens}", name
                )

    def sampling_params(self, defaults: SamplingParams, **overrides: Any) -> SamplingParams:
        """The checkpoint's defaults, under what the request gives, under `overrides`.

        Raises:
            ConfigError: a value cannot be used.
        """
        given = {name: getattr(self, name) for name in _PASSED_ON if getattr(self, name) is not None}
        if self.stop is not None:
            given["stop"] = tuple(self.stop)
        if self.logit_bias is not None:
            given["logit_bias"] = _token_biases(self.logit_bias)
        return dataclasses.replace(defaults, **{**given, **overrides})


def check_logprobs(name: str, value: int | None, config: ServerConfig) -> None:
    """Refuse more logprobs a token than the server gives."""
    if value is not None and not 0 <= value <= config.max_logprobs:
        raise bad_request(f"{name} must be from 0 to {config.max_logprobs}, got {value}", name)


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    for key, value in biases.items():
        # int() would take "1_0" and other alphabets' digits.
        # Nor would it take thousands of them.
        if not (key.isascii() and key.isdecimal() and len(key) < 20):
            raise bad_request(
                f"logit_bias has key {key!r:.40}; keys must be token ids (whole numbers from 0)", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise bad_request(
                f"logit_bias of token {key:.20} must be from -100 to 100, got {value}", "logit_bias"
            )
    return {int(key): value for key, value in biases.items()}
