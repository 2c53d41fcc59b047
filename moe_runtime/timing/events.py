"""Marks in time: on the host's clock, or in a GPU's stream, which the host runs ahead of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, Self

import torch


class Event(Protocol):
    """A moment, once it is recorded; it may be recorded again."""

    def record(self) -> None:
        """This moment: now, or when the device comes to it."""
        ...

    def has_passed(self) -> bool:
        """Whether the moment has come; only then may it be compared."""
        ...

    def seconds_until(self, end: Self) -> float:
        """From this moment to a later one of the same kind."""
        ...

    def waited_until(self, end: Self) -> float:
        """How much of that a link is known to have waited for other ranks."""
        ...


class HostEvent:
    """On ranks that compute on the CPU, where what was called is done when it returns."""

    def __init__(
        self,
        waited_s: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            waited_s: seconds, counted up, that a link has waited for other ranks; None: nobody knows.
        """
        self._waited_s = waited_s
        self._clock = clock
        self._at = self._waited = 0.0

    def record(self) -> None:
        """See Event."""
        self._at = self._clock()
        if self._waited_s is not None:
            self._waited = self._waited_s()

    def has_passed(self) -> bool:
        """See Event."""
        return True

    def seconds_until(self, end: HostEvent) -> float:
        """See Event."""
        return end._at - self._at

    def waited_until(self, end: HostEvent) -> float:
        """See Event."""
        return end._waited - self._waited


class DeviceEvent:
    """In the current CUDA stream. Where the device has nothing to do, its times are the host's."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        """See Event."""
        self._event.record()

    def has_passed(self) -> bool:
        """See Event; does not wait."""
        return self._event.query()

    def seconds_until(self, end: DeviceEvent) -> float:
        """See Event."""
        return self._event.elapsed_time(end._event) / 1e3

    def waited_until(self, end: DeviceEvent) -> float:
        """See Event; no collective tells."""
        return 0.0
