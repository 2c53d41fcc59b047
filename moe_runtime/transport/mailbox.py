"""Mailbox: what a rank's step loop is told from outside, and the lock under which the loop may park.

Parking: all ranks park after the same agreement, whose number is the same on every rank, since agreements
are collective. A rank that finds mail while it is parked wakes the others with that number. A wake-up that
arrives before its receiver has parked is remembered, so none is lost; one for an earlier parking is ignored,
so none is taken twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_runtime.request import EngineRequest

_QUIET_S = 0.002  # between two requests of a burst there is less
_MOST_SETTLING_S = 0.02  # however long the burst goes on


class Submitted(NamedTuple):
    """A request that came in."""

    driver: str
    request: EngineRequest
    at: float  # time.perf_counter when it came


@dataclass(slots=True)
class Mail:
    """Everything that came in since the loop last looked."""

    submitted: list[Submitted] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)  # request ids
    calls: list[Callable[[], None]] = field(default_factory=list)  # to be made by the loop

    def __bool__(self) -> bool:
        return bool(self.submitted or self.aborted or self.calls)


class Mailbox:
    """Filled by the threads that read sockets and by actor calls, emptied by the step loop."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._changed = threading.Condition()
        self._mail = Mail()
        self._woken_for = -1  # highest agreement number that a peer has woken us for
        self._stopping = False
        self._paused = False

    # ------------------------------------------------------------------- the outside

    def submit(self, driver: str, requests: list[EngineRequest]) -> None:
        """New requests of a driver."""
        now = time.perf_counter()
        with self._changed:
            self._mail.submitted.extend(Submitted(driver, request, now) for request in requests)
            self._changed.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        """End these requests, wherever they are."""
        with self._changed:
            self._mail.aborted.extend(request_ids)
            self._changed.notify_all()

    def call(self, function: Callable[[], None]) -> None:
        """Have the step loop call a function between two steps."""
        with self._changed:
            self._mail.calls.append(function)
            self._changed.notify_all()

    def wake(self, generation: int, step: int) -> None:
        """A peer has left the parking after agreement `step`; one of an earlier generation is ignored."""
        with self._changed:
            if generation == self._generation:
                self._woken_for = max(self._woken_for, step)
                self._changed.notify_all()

    def stop(self) -> None:
        """Have the loop end, on every rank, at the next agreement."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def pause(self, paused: bool) -> None:
        """Have this rank keep its work to itself until this is taken back; all ranks are told the same."""
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    # ------------------------------------------------------------------- the step loop

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def paused(self) -> bool:
        return self._paused

    def take(self) -> Mail:
        """Everything that came in; the mailbox is empty then."""
        with self._changed:
            mail, self._mail = self._mail, Mail()
            return mail

    def park(self, step: int, has_work: bool, wake_peers: Callable[[int], None]) -> None:
        """Wait, after agreement `step`, until there is mail here or a peer says that it has some.

        Args:
            has_work: there is work here already, kept back while this rank is paused.
            wake_peers: called with `step`, outside the lock, if this rank leaves for a reason of its own.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._woken_for >= step or self._own_reason(has_work))
            own_reason = self._own_reason(has_work)
        if own_reason:
            wake_peers(step)

    def settle(self, quiet_s: float = _QUIET_S, most_s: float = _MOST_SETTLING_S) -> None:
        """Wait until the burst of requests that ended a parking has come in: until none comes for `quiet_s`."""
        end = time.monotonic() + most_s
        with self._changed:
            before = -1
            while before != len(self._mail.submitted) and time.monotonic() < end:
                before = len(self._mail.submitted)
                self._changed.wait_for(lambda: self._stopping, quiet_s)

    def _own_reason(self, has_work: bool) -> bool:
        return self._stopping or (not self._paused and (has_work or bool(self._mail)))
