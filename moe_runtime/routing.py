"""RequestRouter: which rank a request goes to, by load and by the prefixes that ranks have seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# Prefixes remembered a rank; a rank's own cache decides what is really there.
_MAX_PREFIXES = 4096
# A prefix is remembered at every multiple of this many blocks.
_BLOCKS_A_STEP = 4


class RequestRouter:
    """Sends a request where the fewest tokens wait, less those of its prompt that a rank has likely cached.

    Not thread-safe: the caller holds a lock.
    """

    def __init__(self, num_ranks: int, block_size: int) -> None:
        self._step = block_size * _BLOCKS_A_STEP
        self._load = [0] * num_ranks  # tokens of requests in flight
        self._seen: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_ranks)]
        self._next = 0  # where the search starts, so that ranks of equal load take turns

    def route(self, prompt: Sequence[int], num_tokens: int) -> int:
        """The rank for a prompt of token ids; `num_tokens` count as its load until `release`."""
        prefixes = self._prefixes(prompt)
        num_ranks = len(self._load)
        order = [(self._next + i) % num_ranks for i in range(num_ranks)]
        rank = min(order, key=lambda r: self._load[r] - self._cached(r, prefixes))
        self._next = (rank + 1) % num_ranks
        self._load[rank] += num_tokens
        self._remember(rank, prefixes)
        return rank

    def release(self, rank: int, num_tokens: int) -> None:
        """A request has ended."""
        self._load[rank] -= num_tokens

    def _prefixes(self, prompt: Sequence[int]) -> list[int]:
        """Hashes of the prompt's prefixes, shortest first, one for every step of blocks."""
        hashes: list[int] = []
        for end in range(self._step, len(prompt) + 1, self._step):
            hashes.append(hash((hashes[-1] if hashes else 0, tuple(prompt[end - self._step : end]))))
        return hashes

    def _cached(self, rank: int, prefixes: list[int]) -> int:
        """Tokens of the longest prefix that this rank has been sent."""
        seen = self._seen[rank]
        for index in range(len(prefixes) - 1, -1, -1):
            if prefixes[index] in seen:
                return (index + 1) * self._step
        return 0

    def _remember(self, rank: int, prefixes: list[int]) -> None:
        seen = self._seen[rank]
        for prefix in prefixes:
            seen[prefix] = None
            seen.move_to_end(prefix)
        while len(seen) > _MAX_PREFIXES:
            seen.popitem(last=False)
