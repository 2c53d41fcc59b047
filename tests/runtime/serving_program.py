"""Stands in for `moe-runtime serve`: LOG HOW are its arguments, and LOG holds what happened to it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.runtime.openai_stub import chat_chunks, openai_stub, text_chunks


class _Endless:
    """An answer that begins."""

    def __iter__(self) -> Iterator[Any]:
        yield chat_chunks("begun")[1]
        threading.Event().wait()


_ANSWERS: dict[str, Any] = {
    "chats": chat_chunks("Hello"),
    "completes": text_chunks(" of old"),
    "refuses": (400, {"error": {"message": "no"}}),
    "never ends": _Endless(),
}


def _main(log: Path, how: str) -> None:
    def note(what: object) -> None:
        with log.open("a") as file:
            print(what, file=file)

    def leave(number: int, frame: FrameType | None) -> None:
        note(signal.Signals(number).name)
        sys.exit()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    note(os.getpid())
    print("a line of some rank", flush=True)
    with openai_stub([_ANSWERS[how]], key=os.environ.get("MOE_RUNTIME_API_KEY")) as stub:
        print(f"moe-runtime: serving demo at {stub.base_url.removesuffix('/v1')}", flush=True)
        signal.pause()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
