"""Traffic: how much a rank hands over to others, as its dispatchers count it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Bytes since the rank started; padding, expert ids and weights that travel with tokens included.

    Between nodes and GPUs a row counts once for each rank that it is sent to. In shared memory it counts once: it
    is written for all and read where it lies.
    """

    dispatch: int = 0
    combine: int = 0
