"""A server that a client starts for itself where none answers, and that ends with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from moe_runtime.errors import ServerError
from moe_runtime.reachable import accepts_connections
from moe_runtime.signals import sigterm_as_exit

_CONNECT_TIMEOUT_S = 2.0
_START_LIMIT_S = 900.0
# More than `serve` gives the requests at work, then Ray's end.
_END_LIMIT_S = 60.0
_POLL_S = 0.1
_READY_LINE = re.compile(r"^moe-runtime: serving .+ at (\S+)$")
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def is_answered(base_url: str) -> bool:
    """Whether anything listens there; what it is, a request will tell."""
    parts = urlsplit(base_url)
    return accepts_connections(parts.hostname, parts.port, _CONNECT_TIMEOUT_S)


@contextlib.contextmanager
def own_server(model: str | None, api_key: str | None) -> Iterator[str]:
    """The base URL, with its `/v1`, of a server that runs until the end of the block, on a free port of this host.

    Args:
        model: checkpoint directory or Hub id; None for the demo checkpoint.
        api_key: that the server is to ask for, if any.

    Raises:
        ServerError: it ended before it was ready, with the server's exit status; or it was not ready in time.
    """
    with sigterm_as_exit():
        process = _start(_command(model), api_key)
        try:
            yield f"{_url_when_ready(process, model)}/v1"
        finally:
            _end(process)


def _command(model: str | None) -> list[str]:
    named = [] if model is None else [model]
    return [sys.executable, "-m", "moe_runtime", "serve", *named, "--host", "127.0.0.1", "--port", "0"]


def _start(command: list[str], api_key: str | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        # Not an argument: those can be read by everybody on this machine.
        env={**os.environ, **({"MOE_RUNTIME_API_KEY": api_key} if api_key else {})},
        start_new_session=True,  # Ctrl-C stops an answer, not the server
        preexec_fn=_end_with_parent(),
    )


def _end_with_parent() -> Callable[[], None] | None:
    """What has the server end when we are killed with no time to end it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) and None


def _url_when_ready(process: subprocess.Popen[str], model: str | None) -> str:
    found: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, found), daemon=True).start()
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        status = process.poll()
        with contextlib.suppress(queue.Empty):
            return found.get(timeout=_POLL_S)
        if status is not None:
            error = ServerError(
                f"the server for {model or 'the demo checkpoint'} ended with status {status} before it was ready"
            )
            error.exit_status = status if status > 0 else 1
            raise error
    raise ServerError(
        f"the server for {model or 'the demo checkpoint'} was not ready within {_START_LIMIT_S:g} s; start it "
        "with `moe-runtime serve`, which waits for as long as it takes"
    )


def _read(process: subprocess.Popen[str], found: queue.SimpleQueue[str]) -> None:
    """To the end, lest the pipe fill up. Lines that are not for us, such as the ranks', are no answer: to stderr."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if ready := _READY_LINE.match(line):
                found.put(ready[1])
            else:
                print(line, end="", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    while process.returncode is None:
        try:
            process.wait(_END_LIMIT_S)
        except (KeyboardInterrupt, SystemExit):
            process.terminate()  # a second one has it abort what is at work
        except subprocess.TimeoutExpired:
            process.kill()
