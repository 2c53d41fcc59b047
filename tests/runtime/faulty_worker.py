"""Workers without a model, for tests of the actors around them: they fail in the ways that ranks fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.groups import ProcessGroups, connect_store, host_store


class FaultyWorker:
    """Joins a group of `size` ranks; `work` makes collectives until the rank named in its fault fails."""

    def __init__(self, rank_and_size: tuple[int, int]) -> None:
        self._rank, self._size = rank_and_size

    def where(self) -> tuple[str, int]:
        return "127.0.0.1", os.getpid()

    def host_store(self) -> tuple[str, int]:
        self._store, address = host_store("127.0.0.1", self._size, 30)
        return address

    def join(self, address: tuple[str, int]) -> None:
        store = self._store if self._rank == 0 else connect_store(address, self._size, 30)
        self._groups = ProcessGroups.join(store, self._rank, self._size, "127.0.0.1", torch.device("cpu"), 30)

    def work(self, failing_rank: int, how: str) -> Iterator[Any]:
        for step in range(1000):
            self._groups.agree([step])
            if step == 3:
                yield step
                if self._rank == failing_rank:
                    _fail(how)
            if how == "nothing" and step == 10:
                return
            time.sleep(0.001)


def _fail(how: str) -> None:
    if how == "raise":
        raise ZeroDivisionError("a kernel went wrong")
    if how == "user error":
        raise CheckpointError("model.safetensors is truncated")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
