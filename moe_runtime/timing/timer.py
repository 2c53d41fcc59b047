"""PartTimer: a stopwatch over the steps of one rank.

Timing every step would cost small models some percent, so one of several is measured and counts for all since the
last one. A measured step leaves events behind, which are read once the last of them has passed: nothing ever waits
for a device. Ranks count steps alike, so that all measure the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from torch import nn

from moe_runtime.timing.events import DeviceEvent, Event, HostEvent
from moe_runtime.timing.layers import LayerHooks
from moe_runtime.timing.parts import Part

# A step in so many is measured: on the host it takes a percent or two longer for that, and on a device it leaves
# some hundred events.
HOST_INTERVAL = 16
DEVICE_INTERVAL = 32

_AMONG_PEERS = (Part.DISPATCH, Part.COMBINE)

E = TypeVar("E", bound=Event)


class PartTimer(Generic[E]):
    """All but `seconds` is called from the thread of the step loop."""

    def __init__(self, interval: int, new_event: Callable[[], E]) -> None:
        """
        Args:
            interval: steps, of which one is measured; the first is measured in any case.
        """
        self._interval = interval
        self._new_event = new_event
        self._free: list[E] = []
        self._hooks = LayerHooks(self.switch)
        self._num_steps = 0  # since the last measured one
        self._is_first = True  # none has been measured
        self._marks: list[tuple[Part, E]] = []  # of the step that is being measured
        self._unread: list[tuple[Part, E]] = []  # of the one before, until its last event has passed
        self._weight = 1  # steps that the unread one stands for
        self._has_prompts = False  # the unread one: some rank computed prompts in it
        self._seconds = (0.0,) * len(Part)
        self._prompt_seconds = (0.0,) * len(Part)
        self.measures = False  # whether the step that goes on is measured

    @classmethod
    def on_host(cls, waited_s: Callable[[], float] | None = None) -> PartTimer[HostEvent]:
        """For a rank that computes on the CPU.

        Args:
            waited_s: seconds, counted up, that dispatch and combine have waited for other ranks, where
                that is known; they become WAITING. Otherwise DISPATCH and COMBINE hold them.
        """
        return PartTimer(HOST_INTERVAL, lambda: HostEvent(waited_s))

    @classmethod
    def on_device(cls) -> PartTimer[DeviceEvent]:
        """For a rank that computes on a GPU."""
        return PartTimer(DEVICE_INTERVAL, DeviceEvent)

    def measure_one_of(self, interval: int) -> None:
        """From now on measure one step of so many; all ranks are told the same while none has work."""
        self._interval = interval

    def watch(self, model: nn.Module) -> None:
        """Tell the attention layers of `model` apart, if it is a CausalLM."""
        self._hooks.find(model)

    def start(self) -> None:
        """A step begins, with OTHER; one that began before and was not stopped is as if it had never been."""
        self._read()
        self._free += [event for _, event in self._marks]
        self._marks = []
        self.measures = not self._unread and (self._is_first or self._num_steps + 1 >= self._interval)
        if self.measures:
            self._hooks.attach()
            self.switch(Part.OTHER)

    def switch(self, part: Part) -> None:
        """The part before ends here and `part` begins."""
        if self.measures:
            event = self._free.pop() if self._free else self._new_event()
            event.record()
            self._marks.append((part, event))

    def stop(self, has_prompts: bool = False) -> None:
        """The step ends.

        Args:
            has_prompts: some rank computed tokens of prompts in it.
        """
        self._num_steps += 1
        if not self.measures:
            return
        self.switch(Part.OTHER)
        self.measures = False
        self._hooks.detach()
        self._unread, self._marks = self._marks, []
        self._weight, self._num_steps, self._is_first = self._num_steps, 0, False
        self._has_prompts = has_prompts
        self._read()

    def seconds(self) -> dict[str, float]:
        """Seconds by part's label, over all steps so far; none ever falls. From any thread."""
        return _by_label(self._seconds)

    def prompt_seconds(self) -> dict[str, float]:
        """What of `seconds` was spent in steps in which some rank computed prompts.

        Exact where every step is measured; otherwise a measured step stands for others of both kinds.
        """
        return _by_label(self._prompt_seconds)

    def _read(self) -> None:
        marks = self._unread
        if not marks or not marks[-1][1].has_passed():
            return
        step = [0.0] * len(Part)
        for (part, begin), (_, end) in pairwise(marks):
            waited = begin.waited_until(end) if part in _AMONG_PEERS else 0.0
            step[part] += self._weight * (begin.seconds_until(end) - waited)
            step[Part.WAITING] += self._weight * waited
        if self._has_prompts:
            self._prompt_seconds = _sum(self._prompt_seconds, step)
        self._seconds = _sum(self._seconds, step)
        self._unread = []
        self._free += [event for _, event in marks]


def _sum(totals: Sequence[float], step: Sequence[float]) -> tuple[float, ...]:
    return tuple(total + seconds for total, seconds in zip(totals, step, strict=True))


def _by_label(seconds: Sequence[float]) -> dict[str, float]:
    return {part.label: spent for part, spent in zip(Part, seconds, strict=True)}
