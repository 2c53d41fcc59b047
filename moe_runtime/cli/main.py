"""Entry point of `moe-runtime`: the parser, and what an error looks like on the command line."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from moe_runtime import __version__
from moe_runtime.errors import MoeRuntimeError, UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, and errors of one line that name the nearest match."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flags = [flag for parser in _with_subparsers(self) for flag in parser._option_string_actions]
            message += did_you_mean(unknown.group(1).split("=")[0], flags)
        self.exit(2, f"{self.prog}: error: {message}\n")


def _with_subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.extend(action.choices.values())
    return found


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from moe_runtime.cli import (
        bench,
        chat,
        complete,
        generate,
        inspect,
        run_batch,
        serve,
        simulate,
        status,
        stop,
    )

    parser = Parser(
        prog="moe-runtime",
        description="Serve sparse mixture-of-experts language models with expert parallelism on Ray.",
    )
    parser.add_argument("--version", action="version", version=f"moe-runtime {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (generate, serve, run_batch, chat, complete, inspect, status, stop, bench, simulate):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C."""
    try:
        args = build_parser().parse_args(argv)
        _have_ray_show_every_rank()
        logging.basicConfig(
            level=os.environ.get("MOE_RUNTIME_LOG", "WARNING").upper(),
            format="%(levelname)s %(name)s: %(message)s",
        )
        return args.func(args)
    except MoeRuntimeError as error:
        kind = "error" if isinstance(error, UserError) else type(error).__name__
        print(f"moe-runtime: {kind}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("moe-runtime: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _have_ray_show_every_rank() -> None:
    """Settings that Ray reads when it is imported: each rank's lines, as they are, in a file without colours."""
    # Ray takes lines of two ranks that differ in numbers only for one and shows one of them.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
