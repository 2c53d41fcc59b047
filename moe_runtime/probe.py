"""RankProbe: what benchmarks ask of a rank that serves. The step loop does it between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from moe_runtime.experts.routing_tap import RoutingTap
from moe_runtime.timing.timer import PartTimer

# A step takes less than that.
_TIMEOUT_S = 120.0

T = TypeVar("T")


class RankProbe:
    """Called from threads beside the loop; each method returns once it is done."""

    def __init__(
        self,
        call: Callable[[Callable[[], None]], None],
        timer: PartTimer[Any],
        tap: RoutingTap,
        *,
        rank: int,
        num_ranks: int,
        read_speed: Callable[[float], float | None] | None = None,
    ) -> None:
        """
        Args:
            call: has the loop call a function between two steps.
            read_speed: given seconds to take, bytes a second at which the rank reads its weights; None: on GPUs.
        """
        self._call = call
        self._rank = rank
        self._num_ranks = num_ranks
        self._timer = timer
        self._tap = tap
        self._read_speed = read_speed

    def settle(self) -> None:
        """Return once the step that goes on, if one does, has ended and is counted."""
        self._between_steps(lambda: None)

    def measure_one_of(self, interval: int) -> None:
        """Measure one step of so many; all ranks are told the same while none has work."""
        self._between_steps(lambda: self._timer.measure_one_of(interval))

    def read_speed(self, seconds: float) -> float | None:
        """Bytes a second at which this rank reads its weights, as all do that are asked at once; None: unknown."""
        read_speed = self._read_speed
        return None if read_speed is None else self._between_steps(lambda: read_speed(seconds))

    def record_choices(self, on: bool) -> None:
        """Begin or end to write down which experts this rank's tokens choose."""
        self._between_steps(lambda: self._tap.record(on))

    def take_choices(self) -> list[np.ndarray]:
        """See RoutingTap.take."""
        return self._between_steps(self._tap.take)

    def replay_choices(self, choices_SK: Sequence[np.ndarray] | None) -> None:
        """See RoutingTap.replay; each rank begins at a place of its own, so that not all choose alike."""
        first = 0 if choices_SK is None else self._rank * len(choices_SK[0]) // self._num_ranks
        self._between_steps(lambda: self._tap.replay(choices_SK, first))

    def _between_steps(self, function: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:  # the caller's, not the loop's
                done.set_exception(error)

        self._call(run)
        return done.result(timeout=_TIMEOUT_S)
