"""A peer that serve.py runs in tests; the variant says how it behaves.

It "generates" the number of each prompt, which tells its answers apart, and says when it computed.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class Peer:
    """Behaves as its variant says: ok, chatty, refuses, raises, dies, short or hangs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._behaviour = settings["variant"]
        if self._behaviour == "refuses":
            raise ValueError("no such checkpoint")
        self._num_requests = 0
        self.facts = {"version": "1", "tunable": True, "settings": settings, "pid": os.getpid()}

    def generate(self, prompts: list[list[int]], output_len: int, tune: bool) -> dict[str, Any]:
        self._num_requests += 1
        getattr(self, f"_{self._behaviour}", lambda: None)()
        length = output_len - 1 if self._behaviour == "short" else output_len
        return {
            "seconds": 2.0,
            "first_token_seconds": 0.5,
            "decode_tokens": len(prompts) * (output_len - 1),
            "tokens": [[number] * length for number in range(len(prompts))],
            "details": {"tuned": tune, "number": self._num_requests},
        }

    def _chatty(self) -> None:
        print("this library greets you on stdout", flush=True)
        os.write(1, b"and so does its C code\n")

    def _raises(self) -> None:
        raise RuntimeError("out of cells\nsecond line")

    def _dies(self) -> None:
        if self._num_requests == 2:  # the first batch after the warm-up
            print("ggml_abort: cells", file=sys.stderr, flush=True)
            os.abort()

    def _hangs(self) -> None:
        time.sleep(60)
