"""A program under test with everything that it starts: its processes, what it says, what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
SCENARIOS = Path(__file__).parent / "scenarios"
# The packages of this checkout, wherever an editable install has its own from.
_PYTHONPATH = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "models")))
# Inherited by every process that a program starts, whoever its parent is by then.
_MARK = "MOE_RUNTIME_TEST_PROGRAM"
_SHARED_MEMORY = Path("/dev/shm")


class Program:
    """A Python script that runs as a terminal would run it: in a process group of its own."""

    def __init__(
        self, directory: Path, argv: Sequence[str | Path], env: Mapping[str, str | None] | None = None
    ) -> None:
        """
        Args:
            env: what differs from this process's environment; None: not set.
        """
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        self._shared_memory_before = _shared_memory_files()
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        name, value = self._mark.split("=")
        whole_env = {**os.environ, **(env or {}), name: value, "PYTHONPATH": _PYTHONPATH}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-u", *map(str, argv)],
                cwd=REPOSITORY,
                env={name: value for name, value in whole_env.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                # A shell that runs the tests in the background has them ignore SIGINT, which is inherited.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def wait_for(self, words: str, timeout_s: float = 120) -> None:
        """Wait until the program has written `words`."""
        self._wait(lambda: words in self.stdout or self._process.poll() is not None, timeout_s, f"{words!r}")
        if words not in self.stdout:
            pytest.fail(f"the program ended before it wrote {words!r}\n{self._said()}")

    def wait_until(self, what: str, holds: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait until something holds while the program runs."""
        self._wait(lambda: holds() or self._process.poll() is not None, timeout_s, what)
        if not holds():
            pytest.fail(f"the program ended before {what}\n{self._said()}")

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground group."""
        os.killpg(self.pid, signal.SIGINT)

    def signal(self, number: int) -> None:
        """Signal the program alone."""
        self._process.send_signal(number)

    def finish(self, timeout_s: float = 120) -> int:
        """Wait for the end; returns the exit status (negative: the signal that ended it)."""
        self._wait(lambda: self._process.poll() is not None, timeout_s, "its end")
        return int(self._process.returncode)

    def succeed(self, timeout_s: float = 120) -> None:
        """Wait for the end, which must be exit status 0."""
        status = self.finish(timeout_s)
        if status != 0:
            pytest.fail(f"exit status {status}\n{self._said()}")

    def assert_left_nothing(self, timeout_s: float = 15) -> None:
        """No process that descends from the program, and no shared memory of its time, outlives it."""
        self._wait(lambda: not self._left(), timeout_s, "the end of all that it started", self._left)

    def end(self) -> None:
        """Kill whatever is left of it."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _left(self) -> list[str]:
        left = [f"process {p.pid}: {_command(p)}" for p in self._processes()]
        files = _shared_memory_files() - self._shared_memory_before
        return left + [f"/dev/shm/{name}" for name in sorted(files - _shared_memory_in_use())]

    def _processes(self) -> list[psutil.Process]:
        """Every live process that carries the program's mark, itself included."""
        return [p for p in psutil.process_iter() if self._mark.encode() in _environment(p).split(b"\0")]

    def _wait(
        self,
        done: Callable[[], bool],
        timeout_s: float,
        what: str,
        details: Callable[[], Sequence[str]] = lambda: (),
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {timeout_s:g} s for {what}\n" + "\n".join([*details(), self._said()]))
            time.sleep(0.02)

    def _said(self) -> str:
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@contextmanager
def running(
    directory: Path, argv: Sequence[str | Path], env: Mapping[str, str | None] | None = None
) -> Iterator[Program]:
    """A Program that is killed with all that it started at the end of the block."""
    program = Program(directory, argv, env)
    try:
        yield program
    finally:
        program.end()


def _environment(process: psutil.Process) -> bytes:
    """Empty for a process that has ended, a zombie, or another user's."""
    try:
        return Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return b""


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "(ended)"


def _shared_memory_files() -> set[str]:
    return {file.name for file in _SHARED_MEMORY.iterdir()}


def _shared_memory_in_use() -> set[str]:
    """Names under /dev/shm that a live process has mapped: those of others who use the machine meanwhile."""
    used: set[str] = set()
    for process in psutil.process_iter():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if f"{_SHARED_MEMORY}/" in line)
        used.update(path.removeprefix(f"{_SHARED_MEMORY}/").split("/")[0] for path in paths)
    return used
