"""The command line, saying on standard output which moment of a deployment's life comes next.

    python command.py ARGUMENTS OF moe-runtime

Each moment is a line "@NAME"; "@ranks" is followed by the ranks' process ids.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import ray

from moe_runtime import LLM, engine, frontend
from moe_runtime.cli.main import main
from moe_runtime.ranks import Ranks


def announce(owner: Any, name: str, moment: str) -> None:
    """Have a function print "@moment" whenever it is called."""
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def announced(*args: Any, **kwargs: Any) -> Any:
        print(f"@{moment}", flush=True)
        return original(*args, **kwargs)

    setattr(owner, name, announced)


def announce_calls() -> None:
    """Have the calls that ranks get print their method, as "@load"; "@generate" comes with the first token."""
    locate, stream, generate = Ranks.locate, Ranks.stream, LLM.stream

    def announced_locate(self: Ranks) -> Any:
        print("@create", flush=True)
        addresses = locate(self)
        print("@ranks", *(address.pid for address in addresses), flush=True)
        return addresses

    def announced_stream(self: Ranks, method: str, *args: Any) -> Any:
        print(f"@{method}", flush=True)
        return stream(self, method, *args)

    def announced_generate(self: LLM, *args: Any) -> Any:
        for number, item in enumerate(generate(self, *args)):
            if number == 0:
                print("@generate", flush=True)
            yield item

    Ranks.locate, Ranks.stream = announced_locate, announced_stream  # type: ignore[method-assign]
    LLM.stream = announced_generate  # type: ignore[method-assign]


announce(ray, "init", "connect")
announce(frontend, "inspect_model", "inspect")
announce(engine.Placement, "reserve", "reserve")
announce(Ranks, "call_one", "join")
announce_calls()
sys.exit(main())
