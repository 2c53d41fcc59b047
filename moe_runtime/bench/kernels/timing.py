"""Timing several calls side by side, so that what else runs on the machine meets all of them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# A call shorter than this is repeated until it is not: clocks are no finer.
_SHORTEST_S = 0.01


@dataclass(frozen=True, slots=True)
class Timing:
    """What one call takes."""

    seconds: float  # median of the rounds
    num_rounds: int  # in which it was timed


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]],
    num_rounds: int,
    budgets_s: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, Timing]:
    """Seconds that one call of each takes by `clock`: the median of `num_rounds` rounds.

    By default CPU time of this thread, so that other processes on the core do not count; calls that compute in several
    threads need the wall clock.

    Args:
        budgets_s: by name, seconds that all rounds of a call may take; a longer one is timed in the first rounds
            only, at least in one.
    """
    repeats, rounds = {}, {}
    for name, call in calls.items():
        once = max(_seconds(call, 1, clock), 1e-7)
        repeats[name] = max(1, round(_SHORTEST_S / once))
        affordable = (budgets_s or {}).get(name, float("inf")) / (repeats[name] * once)
        rounds[name] = max(1, int(min(affordable, num_rounds)))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(num_rounds):
        for name, call in calls.items():
            if number < rounds[name]:
                measured[name].append(_seconds(call, repeats[name], clock))
    return {name: Timing(statistics.median(seconds), len(seconds)) for name, seconds in measured.items()}


def in_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call that makes the next of `calls` each time, and begins again after the last."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _seconds(call: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times
