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

from moe_runtime import engine, llm
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
    """Have the calls that ranks get print their method, as "@load"; "@generate" comes with its first item."""
    locate, stream = Ranks.locate, Ranks.stream

    def announced_locate(self: Ranks) -> Any:
        print("@create", flush=True)
        addresses = locate(self)
        print("@ranks", *(address.pid for address in addresses), flush=True)
        return addresses

    def announced_stream(self: Ranks, method: str, *args: Any) -> Any:
        if method != "generate":
            print(f"@{method}", flush=True)
        for number, item in enumerate(stream(self, method, *args)):
            if method == "generate" and number == 0:
                print("@generate", flush=True)
            yield item

    Ranks.locate, Ranks.stream = announced_locate, announced_stream  # type: ignore[method-assign]


announce(ray, "init", "connect")
announce(llm, "inspect_model", "inspect")
announce(engine.Placement, "reserve", "reserve")
announce(Ranks, "call_one", "join")
announce_calls()
sys.exit(main())
