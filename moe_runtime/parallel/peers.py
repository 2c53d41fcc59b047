"""Processes of the same host, told apart from later ones that get their ids."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that was alive when this was made."""

    pid: int
    start_ticks: int  # clock ticks between the machine's start and the process's

    @classmethod
    def me(cls) -> Peer:
        """The calling process."""
        state = _state_and_start(os.getpid())
        assert state is not None
        return cls(os.getpid(), state[1])

    def is_alive(self) -> bool:
        """Whether it runs, or is stopped; False once it has ended, also while nobody has waited for it."""
        found = _state_and_start(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.start_ticks


def _state_and_start(pid: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The command's name, in parentheses, may hold anything; what follows its last one are fields 3...
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])
