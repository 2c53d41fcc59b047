"""The prefix of every metric, and the buckets of the histograms."""

from __future__ import annotations

PREFIX = "moe_runtime:"


def _decades(first: int, last: int, steps: tuple[float, ...]) -> tuple[float, ...]:
    """Each step times each power of ten from `first` to `last`."""
    return tuple(float(f"{step:g}e{power}") for power in range(first, last + 1) for step in steps)


# Seconds of a whole request or of a phase of it: a millisecond to about a quarter of an hour.
LATENCY_BUCKETS = (*_decades(-3, 2, (1, 2.5, 5)), 1000.0)
# Seconds between tokens, where small differences count: a millisecond to ten seconds.
TOKEN_LATENCY_BUCKETS = (*_decades(-3, 0, (1, 1.5, 2.5, 4, 6)), 10.0)
# Tokens of a prompt or an answer: one to a million.
LENGTH_BUCKETS = (*_decades(0, 5, (1, 2, 5)), 1e6)
