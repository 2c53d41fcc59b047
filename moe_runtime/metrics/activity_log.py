"""ActivityLog: one line for every ten seconds in which requests were in flight."""

from __future__ import annotations

import logging
from collections.abc import Callable

from moe_runtime.metrics.balance import overall_balancedness, tokens_per_rank
from moe_runtime.metrics.samples import Sample

logger = logging.getLogger(__name__)


class ActivityLog:
    """Compares samples. Belongs to one thread."""

    def __init__(
        self,
        latest: Callable[[], Sample | None],
        clock: Callable[[], float],
        write: Callable[[str], None] = logger.info,
    ) -> None:
        """
        Args:
            latest: the ranks' counters, or None where they do not answer.
            write: takes each line.
        """
        self._latest = latest
        self._clock = clock
        self._write = write
        self._last: Sample | None = None
        self._looked_at = 0.0

    def begin(self) -> None:
        """Take what the ranks have counted so far as the past."""
        self._last = self._latest()
        self._looked_at = self._clock()

    def look(self, active: bool) -> None:
        """Write a line about the time since the last call, if requests were in flight."""
        before, since = self._last, self._looked_at
        self._looked_at = self._clock()
        # While this driver is idle too: what others have the same ranks do is not of its next ten seconds.
        sample = self._last = self._latest()
        if active and sample is not None and before is not None and self._looked_at > since:
            self._write(describe(before, sample, self._looked_at - since))


def describe(before: Sample, after: Sample, seconds: float) -> str:
    """What was done between two samples in `seconds` of work, and what the ranks hold after."""

    def grown(counter: str) -> float:
        return after.total(counter) - before.total(counter)

    queried = grown("prefix_query_tokens")
    hits = f"{grown('prefix_hit_tokens') / queried:.1%}" if queried else "none asked"
    balance = _balance(before, after)
    return (
        f"prompt {grown('prompt_tokens') / seconds:.1f} tokens/s, "
        f"generation {grown('generation_tokens') / seconds:.1f} tokens/s, "
        f"running {after.total('num_running'):.0f}, waiting {after.total('num_waiting'):.0f}, "
        f"KV cache {after.share('blocks_used', 'blocks_total'):.1%}, prefix hits {hits}, "
        f"balancedness {'no load' if balance is None else f'{balance:.2f}'}"
    )


def _balance(before: Sample, after: Sample) -> float | None:
    old, new = tokens_per_rank(before.ranks), tokens_per_rank(after.ranks)
    return overall_balancedness(new - old) if old.shape == new.shape else None
