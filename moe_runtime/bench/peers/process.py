"""The driver's side of the protocol: a peer's process, stopped between its turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from moe_runtime.bench.turns import WARMUP_TOKENS, Turn
from moe_runtime.errors import BenchmarkPeerError

_GOODBYE_S = 5.0  # to leave by itself once stdin has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a peer is told first; the fields are the keys of the first line."""

    checkpoint: str  # a directory of safetensors
    variant: str  # what the weights are kept in, in the peer's own words
    threads: int
    max_len: int  # tokens of a prompt and its output together, at most
    max_seqs: int  # requests of a batch, at most
    max_prompt_tokens: int  # of a batch, at most
    gguf: str | None = None  # the same checkpoint as a GGUF file, for those that read these


class PeerProcess:
    """One peer from `start` to the end of the context. Its process group gets all signals, children included."""

    def __init__(
        self, name: str, command: Sequence[str], start: Start, *, tune: bool, timeout_s: float
    ) -> None:
        """
        Args:
            command: a process that speaks the protocol of serve.py.
            tune: let it try its settings in each warm-up.
            timeout_s: that an answer may take.
        """
        self.name = name
        self.facts: dict[str, Any] = {}
        self._command, self._start, self._tune, self._timeout_s = list(command), start, tune, timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: SimpleQueue[str | None] = SimpleQueue()

    def __enter__(self) -> PeerProcess:
        """Start it and have it load the checkpoint; it is paused then.

        Raises:
            BenchmarkPeerError: it cannot be started, or says why it cannot load.
        """
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # closed in `close`
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=_environment(self._command[0], self._start.threads),
                start_new_session=True,
            )
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
            self.facts = self._ask(asdict(self._start))
            self.pause()
        except OSError as error:
            raise BenchmarkPeerError(f"{self.name} did not start: {error}") from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompts: Sequence[list[int]], output_len: int, *, tune: bool = False) -> Turn:
        """One batch.

        Raises:
            BenchmarkPeerError: it failed, or gave no answer in time.
        """
        request = {"prompts": list(prompts), "output_len": output_len, "tune": tune}
        answer = self._ask(request)
        known = {field.name for field in fields(Turn)}
        turn = Turn(**{name: value for name, value in answer.items() if name in known})
        lengths = {len(tokens) for tokens in turn.tokens}
        if len(turn.tokens) != len(prompts) or lengths != {output_len}:
            raise BenchmarkPeerError(
                f"{self.name} generated {sorted(lengths)} tokens for {len(turn.tokens)} prompts; wanted {output_len} "
                f"for each of {len(prompts)}"
            )
        return turn

    def warm_up(self, prompts: Sequence[list[int]], output_len: int) -> None:
        """A few tokens after each prompt, or the whole shape if there are settings to find."""
        if self._tune and self.facts.get("tunable"):
            self.generate(prompts, output_len, tune=True)
        else:
            self.generate(prompts, min(WARMUP_TOKENS, output_len))

    def pause(self) -> None:
        """Stop all its threads: some engines' spin while they wait."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self, goodbye_s: float = _GOODBYE_S) -> None:
        """End its process group, which has `goodbye_s` to leave by itself. Safe to call again."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        with contextlib.suppress(OSError):  # what was written to one that has gone
            process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(goodbye_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._errors.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None:
            raise BenchmarkPeerError(f"{self.name} has ended")
        with contextlib.suppress(BrokenPipeError):  # its end is read below
            process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except Empty:
            self.close(goodbye_s=0)
            raise BenchmarkPeerError(
                f"{self.name} gave no answer in {self._timeout_s:g} s; see --peer-timeout-s"
            ) from None
        if line is None:
            raise BenchmarkPeerError(f"{self.name} ended with status {process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkPeerError(f"{self.name} failed: {answer['error']}")
        return answer

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        """The last line that it wrote to stderr."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1][-300:] if lines else "it said nothing"


def _environment(python: str, threads: int) -> dict[str, str]:
    """Ours, with as many OpenMP threads as all systems have, and without our modules for another Python."""
    import sys

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    return environment
