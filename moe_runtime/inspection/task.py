"""The inspection task: starts the inspecting process in the workers' environment and watches over it.

Imports neither torch nor Ray: the Ray worker that runs it stays small and can be used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from moe_runtime.inspection.child import main; main(int(sys.argv[2]))"
)
# No accelerator is visible to the inspecting process, whatever the worker sees.
_HIDDEN_ACCELERATORS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "",
    "ASCEND_RT_VISIBLE_DEVICES": "",
}
_STDERR_LINES = 40  # of what the process said last, shown with a crash or a time-out
_ABORT_S = 1.0  # for faulthandler to write the stacks of a process that hangs


def run_inspection(request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Inspect in a fresh interpreter; returns its reply, or one that says how it ended without.

    Args:
        request: target, config, dtype, quantization and what is kept of it, as `child` reads them.
        timeout_s: after which the process is killed.

    Returns:
        `{"ok": True, "info": ..., "manifest": ...}`, or `{"ok": False, "error": class name in
        moe_runtime.errors, "message": ..., "traceback": ...}`. Plain values only: they pass through Ray whole.
    """
    node = platform.node()
    full_request = {
        **request,
        "node": node,
        "parent_pid": os.getpid(),
        "started": time.monotonic(),
        "started_ns": time.time_ns(),
    }
    # Files, not pipes: a process that the model started and left behind could hold a pipe open for ever.
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as answer,
        tempfile.TemporaryFile() as output,
    ):
        json.dump(full_request, stdin)
        stdin.flush()
        stdin.seek(0)
        process = _start(stdin, answer, output)
        try:
            process.wait(timeout_s)
            reply = _read_reply(process, answer, output)
        except subprocess.TimeoutExpired:
            reply = _timed_out(process, output, timeout_s)
        finally:
            _kill(process)
    if not reply["ok"]:
        reply["message"] += f" (node {node}, interpreter {sys.executable})"
    return reply


def _start(stdin: IO[str], answer: IO[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    search_path = json.dumps([os.path.abspath(p) for p in sys.path])
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", _BOOTSTRAP, search_path, str(answer.fileno())],
        stdin=stdin,
        stdout=output,
        stderr=output,
        pass_fds=[answer.fileno()],
        env={**os.environ, **_HIDDEN_ACCELERATORS},
        start_new_session=True,  # so that a time-out ends what the model started as well
    )


def _read_reply(process: subprocess.Popen[bytes], answer: IO[str], output: IO[bytes]) -> dict[str, Any]:
    answer.seek(0)
    text = answer.read()
    if process.returncode == 0 and text:
        reply: dict[str, Any] = json.loads(text)
        return reply
    if process.returncode < 0:
        how = f"died of {_signal_text(-process.returncode)}"
    else:
        how = (
            f"left with exit status {process.returncode} and without a result (os._exit in the model's code?)"
        )
    return _failure("InspectionCrashError", f"the process that imported the model {how}", output)


def _timed_out(process: subprocess.Popen[bytes], output: IO[bytes], timeout_s: float) -> dict[str, Any]:
    # faulthandler answers this signal with the stack of every thread: where it hangs.
    process.send_signal(signal.SIGABRT)
    # A model that handles the signal itself is killed all the same.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ABORT_S)
    message = (
        f"importing and building the model did not end within {timeout_s:g} s and was killed; raise the limit with "
        f"--timeout (timeout_s= in Python), or see below where it was"
    )
    return _failure("InspectionTimeoutError", message, output)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started in its session; returns when it is gone."""
    with contextlib.suppress(ProcessLookupError):  # nothing of the session is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(kind: str, message: str, output: IO[bytes]) -> dict[str, Any]:
    output.seek(0)
    lines = output.read().decode(errors="replace").rstrip().splitlines()[-_STDERR_LINES:]
    trace = "\n".join(["last output of the process:", *lines]) if lines else ""
    return {"ok": False, "error": kind, "message": message, "traceback": trace}


def _signal_text(number: int) -> str:
    """`"SIGSEGV (segmentation fault)"`."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    text = (signal.strsignal(number) or "").lower()
    if number == signal.SIGKILL:
        text += "; often the kernel's answer to too little memory"
    return f"{name} ({text})"
