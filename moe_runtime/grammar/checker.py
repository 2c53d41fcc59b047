"""GrammarChecker: a driver's verdict on grammars before any rank sees them, from a process that may be killed.

Compiling cannot be interrupted, and a schema of a few bytes may ask for hours of it, for all memory, or for a stack
without end. So it is tried in a process of its own, which is ended when it takes too long and started again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.library import INSTALL_HINT
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.structured_outputs import StructuredOutputsParams

COMPILE_LIMIT_S = 10.0
_START_LIMIT_S = 120.0  # importing xgrammar, torch with it, and the vocabulary
_MAX_VERDICTS = 4096

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from moe_runtime.grammar.check_process import main; main()"
)
_HIDDEN_ACCELERATORS = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": ""}


class GrammarChecker:
    """Started with the first check; threads take turns."""

    def __init__(
        self,
        files: ModelFiles,
        vocab_size: int,
        end_ids: Sequence[int],
        *,
        limit_s: float = COMPILE_LIMIT_S,
    ) -> None:
        self._order = {"files": str(files.path), "vocab_size": vocab_size, "end_ids": list(end_ids)}
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        # Why each was refused, or None, by digest; the least used is forgotten first.
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()

    def check(self, params: StructuredOutputsParams) -> None:
        """ConfigError if the grammar cannot be compiled, within the limits, for the model's vocabulary.

        MoeRuntimeError if the process cannot be started.
        """
        message = msgspec.json.encode(params)
        digest = hashlib.sha256(message).digest()
        with self._lock:
            if digest not in self._verdicts:
                self._verdicts[digest] = self._ask(message, params.kind)
                if len(self._verdicts) > _MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
            self._verdicts.move_to_end(digest)
            refusal = self._verdicts[digest]
        if refusal is not None:
            raise ConfigError(refusal)

    def close(self) -> None:
        """End the process. A check that waits for it fails; a later one starts another."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, message: bytes, kind: str) -> str | None:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(message + b"\n")
            process.stdin.flush()
            reply = _read_line(process, self._limit_s)
        except (BrokenPipeError, EOFError):
            self._end(process)
            return f"structured_outputs.{kind} ends its compiler (out of memory or too deep); simplify it"
        if reply is None:
            self._end(process)
            return f"structured_outputs.{kind} takes more than {self._limit_s:g} s to compile; simplify it"
        refusal: str | None = reply["refusal"]
        return refusal

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("xgrammar") is None:
            raise ConfigError(INSTALL_HINT)
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps([os.path.abspath(p) for p in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_HIDDEN_ACCELERATORS, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(self._order).encode() + b"\n")
            process.stdin.flush()
            reply = _read_line(process, _START_LIMIT_S)
        except (BrokenPipeError, EOFError):
            reply = {"error": f"it left with exit status {process.wait()}"}
        if reply is None:
            reply = {"error": f"it was not ready after {_START_LIMIT_S:g} s"}
        if "refusal" in reply:
            self._end(process)
            raise ConfigError(reply["refusal"])
        if "error" in reply:
            self._end(process)
            raise MoeRuntimeError(
                f"the process that checks structured_outputs did not start: {reply['error']}"
            )
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any] | None:
    """The process's next line, parsed; None if it does not come in time. EOFError if the process has left."""
    assert process.stdout is not None
    descriptor, deadline, read = process.stdout.fileno(), time.monotonic() + limit_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not read.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = os.read(descriptor, 65536)
            if not piece:
                raise EOFError
            read += piece
    reply: dict[str, Any] = json.loads(read)
    return reply
