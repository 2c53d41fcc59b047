"""RankSampler: what the ranks say of themselves, asked at most once a second whoever wants to know."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_runtime.rank_spec import RankStats

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """All ranks' counters at one moment."""

    at: float  # seconds of the sampler's clock
    ranks: tuple[RankStats, ...]  # in rank order

    def total(self, counter: str) -> float:
        """Sum over the ranks of a counter or gauge of scheduler or loop, by its name there."""
        return sum(_value(rank, counter) for rank in self.ranks)

    def share(self, part: str, whole: str) -> float:
        """One total as a share of another; 0 where that is 0."""
        of = self.total(whole)
        return self.total(part) / of if of else 0.0


class RankSampler:
    """Keeps the last sample. Its methods may be called from any thread; `latest` may wait for the ranks."""

    def __init__(
        self,
        ask: Callable[[], Sequence[RankStats]],
        *,
        on_sample: Callable[[Sample], None] = lambda sample: None,
        clock: Callable[[], float] = time.monotonic,
        min_interval_s: float = MIN_INTERVAL_S,
    ) -> None:
        """
        Args:
            ask: what each rank has done and holds now.
            on_sample: called once with each new sample, one call at a time.
        """
        self._ask = ask
        self._on_sample = on_sample
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._lock = threading.Lock()
        self._asked_at: float | None = None
        self._sample: Sample | None = None
        self._failed = False

    def latest(self) -> Sample | None:
        """The last sample, a new one where it is older than a second; None where the ranks do not answer."""
        with self._lock:
            now = self._clock()
            if self._asked_at is None or now - self._asked_at >= self._min_interval_s:
                self._asked_at = now
                self._sample = self._take()
            return self._sample

    def _take(self) -> Sample | None:
        try:
            ranks = tuple(self._ask())
        except Exception as error:  # Ray has many; what is shown besides must not depend on the ranks
            if not self._failed:
                logger.warning("no metrics of the ranks: %s: %s", type(error).__name__, error)
            self._failed = True
            return None
        self._failed = False
        sample = Sample(self._clock(), ranks)
        self._on_sample(sample)
        return sample


def _value(rank: RankStats, counter: str) -> float:
    return rank.scheduler[counter] if counter in rank.scheduler else rank.loop[counter]
