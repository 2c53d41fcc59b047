"""What SIGTERM does to a process that has started something."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """A handler that ends the process as an exception does, so that what it has started is ended too."""
    sys.exit(128 + number)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """In this block SIGTERM ends the process by `exit_on_signal`."""
    before = signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
