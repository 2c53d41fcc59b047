"""StepClock: how long the parts of a rank's steps take, and how much CPU its threads use meanwhile."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any


class StepClock:
    """Collects full steps, those that `count` was called in, until there are enough of them.

    Everything is called from the thread of the step loop.
    """

    def __init__(self, num_warmup: int, num_steps: int, on_enough: Callable[[], None]) -> None:
        """`on_enough` is called once, when `num_steps` steps after `num_warmup` others were collected."""
        self._num_warmup = num_warmup
        self._num_steps = num_steps
        self._on_enough = on_enough
        self._current: Counter[str] = Counter()
        self._began = 0.0
        self._counts = False
        self._steps: list[Counter[str]] = []
        self._cpu_before: dict[str, float] = {}
        self._wall_before = 0.0
        self.cpu_share: dict[
            str, float
        ] = {}  # by thread name, CPU seconds a second, over the steps collected

    def time(self, owner: Any, method: str, part: str) -> None:
        """From now on count the time that `owner.method` takes towards `part`."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._current[part] += time.perf_counter() - began

        setattr(owner, method, timed)

    def add(self, part: str, seconds: float) -> None:
        """Count time towards a part of the current step."""
        self._current[part] += seconds

    def count(self) -> None:
        """The current step is one to collect."""
        self._counts = True

    def next_step(self) -> None:
        """A step ends here and the next begins."""
        now = time.perf_counter()
        if self._counts and self._num_warmup:
            self._num_warmup -= 1
        elif self._counts and len(self._steps) < self._num_steps:
            self._current["step"] = now - self._began
            self._steps.append(self._current)
            if len(self._steps) == self._num_steps:
                self._finish(now)
        if not self._num_warmup and not self._cpu_before:
            self._cpu_before, self._wall_before = _cpu_of_threads(), now
        self._current, self._counts, self._began = Counter(), False, time.perf_counter()

    def medians_us(self) -> dict[str, float]:
        """Median microseconds a step: "step", each part, and "other", which is no part's."""
        parts = sorted({part for step in self._steps for part in step} - {"step"})
        found = {part: 1e6 * median(step[part] for step in self._steps) for part in ["step", *parts]}
        found["other"] = 1e6 * median(2 * step["step"] - step.total() for step in self._steps)
        return found

    def _finish(self, now: float) -> None:
        seconds = now - self._wall_before
        self.cpu_share = {
            name: (cpu - self._cpu_before.get(name, 0.0)) / seconds for name, cpu in _cpu_of_threads().items()
        }
        self._on_enough()


def _cpu_of_threads() -> dict[str, float]:
    """CPU seconds of this process's Python threads so far, by name."""
    found: Counter[str] = Counter()
    for thread in threading.enumerate():
        if thread.ident is not None:
            found[thread.name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return dict(found)
