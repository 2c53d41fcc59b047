"""What `bench serve` is asked to do, checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_runtime.bench.serving.metrics import METRICS
from moe_runtime.bench.serving.prompt_files import file_prompts
from moe_runtime.bench.serving.prompts import (
    Alphabet,
    Conversation,
    RandomLengths,
    multi_turn_prompts,
    random_prompts,
    shared_prefix_prompts,
)
from moe_runtime.errors import ConfigError, did_you_mean

DATASETS = ("random", "shared-prefix", "multi-turn", "file")
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeWorkload:
    """One run of `bench serve`: a field a flag, by vLLM's names where it has them."""

    endpoint: str = "/v1/completions"
    dataset_name: str = "random"
    dataset_path: str | None = None  # of "file"
    num_prompts: int = 1000  # requests in all
    request_rate: float = math.inf  # a second
    burstiness: float = 1.0
    max_concurrency: int | None = None
    lengths: RandomLengths = field(default_factory=RandomLengths)
    random_vocab_size: int = 1000  # ids of random prompts are below it
    output_len: int | None = None  # of every request of a file, instead of what the file says
    shared_prefix_num_groups: int = 8
    shared_prefix_len: int = 512
    multi_turn_num_turns: int = 4
    multi_turn_num_conversations: int | None = None  # None: as many as give about num_prompts requests
    multi_turn_think_time: float = 0.0  # seconds
    seed: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # of every request
    num_warmups: int = 0
    goodput: Mapping[str, float] = field(default_factory=dict)  # objectives in milliseconds
    percentile_metrics: tuple[str, ...] = tuple(METRICS)
    metric_percentiles: tuple[float, ...] = (99.0,)

    def __post_init__(self) -> None:
        _check_one_of("--dataset-name", self.dataset_name, DATASETS)
        _check_one_of("--endpoint", self.endpoint, ENDPOINTS)
        for name in self.percentile_metrics:
            _check_one_of("--percentile-metrics", name, tuple(METRICS))
        for percent in self.metric_percentiles:
            if not 0 <= percent <= 100:
                raise ConfigError(f"--metric-percentiles must be between 0 and 100, got {percent:g}")
        for flag, value, least in (
            ("--num-prompts", self.num_prompts, 1),
            ("--max-concurrency", self.max_concurrency, 1),
            ("--random-vocab-size", self.random_vocab_size, 2),
            ("--output-len", self.output_len, 1),
            ("--num-warmups", self.num_warmups, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{flag} must be at least {least}, got {value}")
        if (self.dataset_name == "file") != (self.dataset_path is not None):
            raise ConfigError(
                "--dataset-name file needs --dataset-path FILE"
                if self.dataset_path is None
                else f"--dataset-path is for --dataset-name file, got --dataset-name {self.dataset_name}"
            )

    @property
    def is_chat(self) -> bool:
        """Whether requests are messages."""
        return self.endpoint.endswith("/chat/completions")

    @property
    def wants_token_ids(self) -> bool:
        """Whether its prompts are made of token ids, if the server takes them."""
        return self.dataset_name in ("random", "shared-prefix") and not self.is_chat

    def conversations(self, *, as_ids: bool) -> list[Conversation]:
        """What to send; the same for the same seed.

        Args:
            as_ids: random prompts as token ids, else as words.

        Raises:
            ConfigError: the file or the numbers cannot be used.
        """
        alphabet = Alphabet(self.random_vocab_size, as_ids)
        if self.dataset_name == "random":
            return random_prompts(self.num_prompts, self.lengths, alphabet, self.seed)
        if self.dataset_name == "shared-prefix":
            groups, prefix_len = self.shared_prefix_num_groups, self.shared_prefix_len
            return shared_prefix_prompts(
                self.num_prompts, groups, prefix_len, self.lengths, alphabet, self.seed
            )
        if self.dataset_name == "multi-turn":
            turns, count = self.multi_turn_num_turns, self.multi_turn_num_conversations
            if count is None:
                count = max(1, self.num_prompts // max(1, turns))
            return multi_turn_prompts(count, turns, self.multi_turn_think_time, self.lengths, self.seed)
        assert self.dataset_path is not None
        found = file_prompts(
            self.dataset_path, self.num_prompts, self.lengths.output_len, self.output_len, self.seed
        )
        if not self.is_chat and any(_has_messages(conversation) for conversation in found):
            raise ConfigError(
                f'{self.dataset_path} has "messages", which --endpoint {self.endpoint} does not take; '
                "give --endpoint /v1/chat/completions"
            )
        if self.is_chat and any(_has_token_ids(conversation) for conversation in found):
            raise ConfigError(
                f"{self.dataset_path} has prompts of token ids, which --endpoint {self.endpoint} does not take; "
                "give --endpoint /v1/completions"
            )
        return found

    def warmups(self, *, as_ids: bool) -> list[Conversation]:
        """Random prompts that are not among the measured ones: they would be found in a prefix cache."""
        alphabet = Alphabet(self.random_vocab_size, as_ids)
        return random_prompts(self.num_warmups, self.lengths, alphabet, seed=-1 - self.seed)


def _check_one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{flag} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
        )


def _has_messages(conversation: Conversation) -> bool:
    return any(isinstance(turn.prompt[0], dict) for turn in conversation.turns)


def _has_token_ids(conversation: Conversation) -> bool:
    return any(isinstance(turn.prompt[0], int) for turn in conversation.turns)
