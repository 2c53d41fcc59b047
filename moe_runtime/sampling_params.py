"""SamplingParams: how the tokens of a request are chosen and when it ends, in vLLM's names and defaults."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from moe_runtime.arguments import refuse_unknown_arguments
from moe_runtime.errors import ConfigError
from moe_runtime.structured_outputs import StructuredOutputsParams

GREEDY_TEMPERATURE = 1e-5  # below this a softmax is an argmax in float32, and dividing by it may overflow

# Keys of generation_config.json that are defaults for requests, and their names here.
_GENERATION_CONFIG_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}

# Real-valued fields: lowest value, whether it is allowed itself, highest value, what else to say.
_REALS: dict[str, tuple[float, bool, float, str]] = {
    "presence_penalty": (-2.0, True, 2.0, "use 0 for no penalty"),
    "frequency_penalty": (-2.0, True, 2.0, "use 0 for no penalty"),
    "repetition_penalty": (0.0, False, math.inf, "use 1 for no penalty"),
    "temperature": (0.0, True, math.inf, "use 0 for greedy decoding"),
    "top_p": (0.0, False, 1.0, "use 1 for all tokens"),
    "min_p": (0.0, True, 1.0, "use 0 for all tokens"),
}

# Whole-valued fields: lowest value, whether None is allowed, what else to say.
_INTEGERS: dict[str, tuple[float, bool, str]] = {
    "n": (1, False, "it counts the completions of one prompt"),
    "top_k": (-1, False, "use 0 or -1 for all tokens"),
    "seed": (-math.inf, True, "use None for a random one"),
    "max_tokens": (1, True, "use None for as many as the model's length allows"),
    "min_tokens": (0, False, "use 0 for no minimum"),
    "logprobs": (-1, True, "use -1 for the whole vocabulary and None for none"),
    "prompt_logprobs": (-1, True, "use -1 for the whole vocabulary and None for none"),
}

_BOOLS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize")


@refuse_unknown_arguments
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    Immutable: `dataclasses.replace(params, temperature=0)` makes a changed copy. Every value is checked when
    it is made; a bad one raises ConfigError. A temperature below 1e-5 means greedy decoding.
    """

    n: int = 1  # completions of one prompt
    presence_penalty: float = 0.0  # subtracted from the logit of each token already generated, once
    frequency_penalty: float = 0.0  # the same, times how often it was generated
    repetition_penalty: float = 1.0  # divides (or multiplies, below 0) logits of tokens in prompt and output
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_p: float = 1.0  # the smallest set of best tokens with this much probability
    top_k: int = 0  # this many best tokens; 0 and -1 are all
    min_p: float = 0.0  # tokens with at least this share of the best token's probability
    seed: int | None = None  # taken modulo 2**64; None and -1 draw one for each request
    stop: str | list[str] | tuple[str, ...] | None = None  # kept as a tuple
    stop_token_ids: list[int] | tuple[int, ...] | None = None  # kept as a tuple
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the model's length
    min_tokens: int = 0  # no stop token is sampled before there are this many
    logprobs: int | None = None  # this many best tokens beside the sampled one; -1 is the whole vocabulary
    prompt_logprobs: int | None = None  # the same for each token of the prompt
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these tokens; -inf forbids one
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None  # the text's form; forces it token by token

    def __post_init__(self) -> None:
        for name, (low, low_allowed, high, hint) in _REALS.items():
            _check_real(name, getattr(self, name), low, low_allowed, high, hint)
        for name, (lowest, none_allowed, hint) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), lowest, none_allowed, hint)
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        set_field = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        set_field("stop", _checked_stop(self.stop))
        set_field("stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        set_field("logit_bias", _checked_logit_bias(self.logit_bias))
        if self.seed == -1:
            set_field("seed", None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}); "
                "raise max_tokens or lower min_tokens"
            )
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputsParams
        ):
            raise ConfigError(
                f"structured_outputs must be StructuredOutputsParams or None, got {self.structured_outputs!r}"
            )
        if self.stop and not self.detokenize:
            raise ConfigError("stop strings need detokenize=True; use stop_token_ids to stop without text")

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken instead of a random one."""
        return self.temperature < GREEDY_TEMPERATURE

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """Defaults that a checkpoint's parsed generation_config.json gives, under the caller's `overrides`.

        Reads temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens (as max_tokens); other
        keys, `do_sample` among them, are ignored, as in vLLM.
        """
        given = {
            ours: config[theirs]
            for theirs, ours in _GENERATION_CONFIG_KEYS.items()
            if config.get(theirs) is not None
        }
        try:
            defaults = cls(**given)
        except ConfigError as error:
            raise ConfigError(f"generation_config.json: {error}") from None
        return dataclasses.replace(defaults, **overrides)


def _check_real(name: str, value: object, low: float, low_allowed: bool, high: float, hint: str) -> None:
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        above = number >= low if low_allowed else number > low
        if above and number <= high and math.isfinite(number):
            return
    if high == math.inf:
        wanted = f"at least {low:g}" if low_allowed else f"greater than {low:g}"
        if isinstance(value, Real) and float(value) == math.inf:
            wanted = "finite"
    else:
        wanted = f"in {'[' if low_allowed else '('}{low:g}, {high:g}]"
    raise ConfigError(f"{name} must be {wanted}, got {value!r}; {hint}")


def _check_integer(name: str, value: object, lowest: float, none_allowed: bool, hint: str) -> None:
    if value is None and none_allowed:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be a whole number, got {value!r}; {hint}")
    if int(value) < lowest:
        raise ConfigError(f"{name} must be at least {lowest}, got {value!r}; {hint}")


def _checked_stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise ConfigError(f"stop must be a string or a list of strings, got {stop!r}")
    if "" in strings:
        raise ConfigError(f"stop must not hold an empty string, got {stop!r}; it would match at once")
    return tuple(strings)


def _is_token_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _checked_stop_token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple) or not all(map(_is_token_id, ids)):
        raise ConfigError(f"stop_token_ids must be a list of token ids (whole numbers from 0), got {ids!r}")
    return tuple(int(i) for i in ids)


def _checked_logit_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias must be a dict of token id to number, got {bias!r}")
    for token_id, value in bias.items():
        if not _is_token_id(token_id):
            raise ConfigError(
                f"logit_bias has key {token_id!r}; keys must be token ids (whole numbers from 0)"
            )
        if not isinstance(value, Real) or isinstance(value, bool) or not float(value) < math.inf:
            raise ConfigError(
                f"logit_bias of token {token_id} must be a number below infinity, got {value!r}; "
                "use -inf to forbid a token and 100 to force one"
            )
    return {int(token_id): float(value) for token_id, value in bias.items()}
