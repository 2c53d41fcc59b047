"""What a load consists of: conversations of one turn or several, and the random ones.

Every function is deterministic by its `seed`. Random prompts share no beginning unless they are meant to, so that a
server's prefix cache finds in them what it is meant to find.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import ConfigError

# A token id each, a list of messages, or text.
TurnPrompt = str | tuple[int, ...] | tuple[dict[str, Any], ...]

# Each is one token of most tokenizers, with the space in front of it.
_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new"
)
_WORDS = _COMMON.split(" ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request of a conversation."""

    prompt: TurnPrompt  # what is new in this turn
    output_len: int  # tokens to ask for at most
    prompt_len: int | None = None  # tokens of `prompt`, where that is known without a tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns that follow each other: each sends all that was said before it."""

    turns: tuple[Turn, ...]
    think_time_s: float = 0.0  # between an answer and the next turn


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Tokens of random prompts and outputs, as vLLM's random data set draws them."""

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0  # lengths are uniform between (1 - ratio) and (1 + ratio) times these
    prefix_len: int = 0  # tokens in front of the input that every prompt has

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            if getattr(self, name) < 1:
                flag = "--random-" + name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"--random-range-ratio must be at least 0 and below 1, got {self.range_ratio:g}"
            )
        if self.prefix_len < 0:
            raise ConfigError(f"--random-prefix-len must be at least 0, got {self.prefix_len}")

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """An input length and an output length."""
        return self._around(self.input_len, rng), self._around(self.output_len, rng)

    def _around(self, length: int, rng: random.Random) -> int:
        low, high = int(length * (1 - self.range_ratio)), int(length * (1 + self.range_ratio))
        return rng.randint(max(1, low), max(1, high))


@dataclass(frozen=True, slots=True)
class Alphabet:
    """What random prompts are made of: ids below `vocab_size`, or words where the server takes no ids."""

    vocab_size: int
    as_ids: bool

    def draw(self, length: int, rng: random.Random) -> tuple[int, ...] | tuple[str, ...]:
        """`length` pieces, about a token each."""
        if self.as_ids:
            return tuple(rng.randrange(self.vocab_size) for _ in range(length))
        return tuple(rng.choice(_WORDS) for _ in range(length))

    def turn(self, pieces: Sequence[Any], output_len: int) -> Turn:
        """A turn whose prompt they are."""
        if self.as_ids:
            return Turn(prompt=tuple(pieces), output_len=output_len, prompt_len=len(pieces))
        return Turn(prompt=" ".join(pieces), output_len=output_len)


def random_prompts(count: int, lengths: RandomLengths, alphabet: Alphabet, seed: int) -> list[Conversation]:
    """Prompts that have nothing in common but the prefix that `lengths` asks for."""
    rng = random.Random(f"random-{seed}")
    prefix = alphabet.draw(lengths.prefix_len, rng)
    return [_single(prefix, lengths, alphabet, rng) for _ in range(count)]


def shared_prefix_prompts(
    count: int, num_groups: int, prefix_len: int, lengths: RandomLengths, alphabet: Alphabet, seed: int
) -> list[Conversation]:
    """Groups of prompts, in random order; those of a group begin with the same `prefix_len` tokens.

    Raises:
        ConfigError: there are more groups than prompts, or a number is too small.
    """
    if not 1 <= num_groups <= count:
        raise ConfigError(
            f"--shared-prefix-num-groups must be between 1 and --num-prompts {count}, got {num_groups}"
        )
    if prefix_len < 1:
        raise ConfigError(f"--shared-prefix-len must be at least 1, got {prefix_len}")
    rng = random.Random(f"shared-prefix-{seed}")
    prefixes = [alphabet.draw(prefix_len, rng) for _ in range(num_groups)]
    made = [_single(prefixes[number % num_groups], lengths, alphabet, rng) for number in range(count)]
    rng.shuffle(made)
    return made


def multi_turn_prompts(
    num_conversations: int, num_turns: int, think_time_s: float, lengths: RandomLengths, seed: int
) -> list[Conversation]:
    """Conversations in words; what the server answered becomes part of what the next turn sends.

    Raises:
        ConfigError: a number is too small.
    """
    for flag, value in (("num-conversations", num_conversations), ("num-turns", num_turns)):
        if value < 1:
            raise ConfigError(f"--multi-turn-{flag} must be at least 1, got {value}")
    if not think_time_s >= 0:
        raise ConfigError(f"--multi-turn-think-time must be at least 0 seconds, got {think_time_s:g}")
    rng = random.Random(f"multi-turn-{seed}")
    words = Alphabet(0, as_ids=False)
    conversations = []
    prefix = words.draw(lengths.prefix_len, rng)
    for _ in range(num_conversations):
        turns = []
        for number in range(num_turns):
            input_len, output_len = lengths.draw(rng)
            beginning = prefix if number == 0 else ()
            turns.append(words.turn((*beginning, *words.draw(input_len, rng)), output_len))
        conversations.append(Conversation(turns=tuple(turns), think_time_s=think_time_s))
    return conversations


def _single(
    prefix: Sequence[Any], lengths: RandomLengths, alphabet: Alphabet, rng: random.Random
) -> Conversation:
    input_len, output_len = lengths.draw(rng)
    return Conversation(turns=(alphabet.turn((*prefix, *alphabet.draw(input_len, rng)), output_len),))
