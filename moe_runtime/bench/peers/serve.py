"""The peer's side of the protocol: load one peer, then answer requests, one JSON object a line.

Run by file name (`PYTHON serve.py transformers`) by the peer's own Python, so nothing here and in the peers' files
imports anything of this project. A peer's file has a class `Peer`:

    Peer(settings)                  settings: see `Start` in process.py
    peer.facts                      a dict: version, settings that it runs with, tunable if `tune` does something
    peer.generate(prompts, output_len, tune) -> a dict: see `Turn` in turns.py

The first line of stdin is the settings, the answer to it the facts; every further line a request. A line with the key
"error" says what went wrong. The end of stdin ends the process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def main() -> int:
    """Speak the protocol until stdin ends; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="answer a benchmark's requests, or say whether a module is there"
    )
    parser.add_argument("peer", nargs="?", help="name of a file beside this one, without .py")
    parser.add_argument(
        "--check", metavar="MODULE", help="exit with 0 if this Python has MODULE, else with 3"
    )
    args = parser.parse_args()
    # The files here are named after what they import.
    sys.path.pop(0)
    if args.check is not None:
        return 0 if importlib.util.find_spec(args.check) else 3
    _die_with_parent()
    # Libraries print what they like to stdout; the protocol's stream is ours alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        peer = _load(args.peer).Peer(json.loads(sys.stdin.readline()))
        _answer(answers, peer.facts)
        for line in sys.stdin:
            request = json.loads(line)
            _answer(answers, peer.generate(request["prompts"], request["output_len"], request["tune"]))
    except Exception as error:
        traceback.print_exc()
        _answer(answers, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return 1
    return 0


def _load(name: str) -> Any:
    """The module in NAME.py beside this file, under a name that hides no library's."""
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _answer(stream: IO[str], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _die_with_parent() -> None:
    """Have the kernel end this process with the one that started it: a stopped process sees no end of stdin."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
