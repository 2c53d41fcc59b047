"""Workers: daemon threads for calls into xgrammar, which release the GIL and cannot be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], bool]  # must not raise; False has the thread that ran it leave


class Workers:
    """A few threads that take jobs in turn, started with the first job.

    They are daemons, so that a call that never returns does not hold the process back when it leaves.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self.num_threads = num_threads
        self._name = name
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._num_started = 0

    def submit(self, job: Job) -> None:
        """Run a job soon. Called from one thread, or under a lock of the caller's."""
        if self._num_started < self.num_threads:
            self._start()
        self._jobs.put(job)

    def add_one(self) -> None:
        """Start one more thread, in place of one whose job will not end soon and then return False."""
        self._start()

    def _start(self) -> None:
        self._num_started += 1
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while self._jobs.get()():
            pass
