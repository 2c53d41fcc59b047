"""Systems take turns: what each must be able to do, and the rounds in which they do it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_runtime.bench.offline import random_batch
from moe_runtime.errors import BenchmarkPeerError

logger = logging.getLogger(__name__)

WARMUP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One workload: requests that come at once, all of one size."""

    kind: str  # "decode" or "prefill": which rates are of interest
    num_requests: int
    input_len: int  # tokens of each prompt
    output_len: int  # tokens generated for each

    def __str__(self) -> str:
        requests = "request" if self.num_requests == 1 else "requests"
        return f"{self.num_requests} {requests}, {self.input_len} in, {self.output_len} out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a system did with one batch. A peer sends these fields, by name."""

    tokens: list[list[int]]  # generated, in the prompts' order
    seconds: float  # from the prompts' submission to the last token
    first_token_seconds: float | None = None  # until every request had its first token; None: not known
    decode_tokens: int = 0  # of all requests together, generated after that moment
    details: dict[str, Any] = field(default_factory=dict)  # settings of this shape and the like

    @property
    def decode_seconds(self) -> float | None:
        """From every request's first token to the last token; None: not known."""
        return None if self.first_token_seconds is None else self.seconds - self.first_token_seconds


class System(Protocol):
    """An engine that is measured. Between its turns it must leave the cores to others."""

    name: str

    def generate(self, prompts: Sequence[list[int]], output_len: int) -> Turn:
        """`output_len` greedy tokens after each prompt; no token ends a text."""

    def warm_up(self, prompts: Sequence[list[int]], output_len: int) -> None:
        """Do whatever makes later batches of this shape faster."""

    def pause(self) -> None:
        """Others compute now."""

    def resume(self) -> None:
        """The turn begins."""


# Turns of each system in one shape, a turn a round.
Turns = dict[str, list[Turn]]


def take_turns(
    systems: Sequence[System],
    shape: Shape,
    *,
    num_rounds: int,
    vocab_size: int,
    seed: int,
    on_failure: Callable[[System, BenchmarkPeerError], None],
) -> Turns:
    """Warm every system up, then give all of them the same new prompts in each round.

    Every other round goes through them backwards, so that none always follows the same one. A system that fails
    is reported once, left out from then on, and has no turns in the result.
    """
    prompts = _random_prompts(random.Random(f"{seed}-{shape}"), shape, vocab_size)
    turns: Turns = {system.name: [] for system in systems}

    def attempt(system: System, action: Callable[[], Turn | None]) -> None:
        if system.name not in turns:
            return
        try:
            with _turn_of(system):
                turn = action()
        except BenchmarkPeerError as error:
            del turns[system.name]
            on_failure(system, error)
            return
        if turn is not None:
            logger.info("%s: %s took %.2f s", shape, system.name, turn.seconds)
            turns[system.name].append(turn)

    batch = next(prompts)
    for system in systems:
        attempt(system, lambda s=system: s.warm_up(batch, shape.output_len))  # type: ignore[misc]
    for number in range(num_rounds):
        batch = next(prompts)
        for system in systems[:: -1 if number % 2 else 1]:
            attempt(system, lambda s=system, b=batch: s.generate(b, shape.output_len))  # type: ignore[misc]
    return turns


@contextmanager
def _turn_of(system: System) -> Iterator[None]:
    system.resume()
    try:
        yield
    finally:
        system.pause()


def _random_prompts(rng: random.Random, shape: Shape, vocab_size: int) -> Iterator[list[list[int]]]:
    """Batches of new prompts, so that nothing is found in a cache."""
    while True:
        yield random_batch(rng, shape.num_requests, shape.input_len, vocab_size)
