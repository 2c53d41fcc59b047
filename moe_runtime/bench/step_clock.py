"""StepClock: how long the parts of a rank's steps take, and how much CPU its threads use meanwhile."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(slots=True)
class _Step:
    """Seconds of one step by part; "step" is the whole."""

    wall: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # of the loop's thread alone

    def add(self, part: str, began: Moment) -> None:
        wall, cpu = now()
        self.wall[part] += wall - began[0]
        self.cpu[part] += cpu - began[1]


Moment = tuple[float, float]  # seconds on the clock on the wall, and CPU seconds of this thread


def now() -> Moment:
    """This moment on both clocks."""
    return time.perf_counter(), time.thread_time()


class StepClock:
    """Collects full steps, those that `count` was called in, until there are enough of them.

    Everything is called from the thread of the step loop. CPU time tells more where other processes compete
    for the cores: it leaves out what this one spent waiting for them.
    """

    def __init__(self, num_warmup: int, num_steps: int, on_enough: Callable[[], None]) -> None:
        """`on_enough` is called once, when `num_steps` steps after `num_warmup` others were collected."""
        self._num_warmup = num_warmup
        self._num_steps = num_steps
        self._on_enough = on_enough
        self._current = _Step()
        self._began: Moment = (0.0, 0.0)
        self._counts = False
        self._steps: list[_Step] = []
        self._cpu_before: dict[str, float] = {}
        self._wall_before = 0.0
        self.cpu_share: dict[
            str, float
        ] = {}  # by thread name, CPU seconds a second, over the steps collected

    def time(self, owner: Any, method: str, part: str) -> None:
        """From now on count the time that `owner.method` takes towards `part`."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._current.add(part, began)

        setattr(owner, method, timed)

    def add(self, part: str, began: Moment) -> None:
        """Count the time since `began` towards a part of the current step."""
        self._current.add(part, began)

    def count(self) -> None:
        """The current step is one to collect."""
        self._counts = True

    def next_step(self) -> None:
        """A step ends here and the next begins."""
        if self._counts and self._num_warmup:
            self._num_warmup -= 1
        elif self._counts and len(self._steps) < self._num_steps:
            self._current.add("step", self._began)
            self._steps.append(self._current)
            if len(self._steps) == self._num_steps:
                self._finish()
        if not self._num_warmup and not self._cpu_before:
            self._cpu_before, self._wall_before = _cpu_of_threads(), time.perf_counter()
        self._current, self._counts, self._began = _Step(), False, now()

    def wall_us(self) -> dict[str, float]:
        """Median microseconds a step: "step", each part, and "other", which is no part's."""
        return _medians_us([step.wall for step in self._steps])

    def cpu_us(self) -> dict[str, float]:
        """The same of the CPU time of the loop's thread."""
        return _medians_us([step.cpu for step in self._steps])

    def _finish(self) -> None:
        seconds = time.perf_counter() - self._wall_before
        self.cpu_share = {
            name: (cpu - self._cpu_before.get(name, 0.0)) / seconds for name, cpu in _cpu_of_threads().items()
        }
        self._on_enough()


def _medians_us(steps: list[defaultdict[str, float]]) -> dict[str, float]:
    parts = sorted({part for step in steps for part in step})
    found = {part: 1e6 * median(step[part] for step in steps) for part in parts}
    # `total` counts the whole step and each of its parts.
    found["other"] = 1e6 * median(2 * step["step"] - sum(step.values()) for step in steps)
    return found


def _cpu_of_threads() -> dict[str, float]:
    """CPU seconds of this process's Python threads so far, by name."""
    found: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is not None:
            found[thread.name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return dict(found)
