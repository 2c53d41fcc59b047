"""Flags of the commands that are clients of a server, and the client that they make."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from moe_runtime.cli.sampling_args import add_sampling_arguments
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.openai_client import OpenAIClient

KEY_VARIABLES = ("MOE_RUNTIME_API_KEY", "OPENAI_API_KEY")
_DEFAULT_BASE_URL = "http://localhost:8000/v1"


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """--base-url, --api-key, --model and the sampling flags."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--base-url",
        default=_DEFAULT_BASE_URL,
        metavar="URL",
        help=f"with its /v1 (default: {_DEFAULT_BASE_URL})",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help=f"default: {' or '.join(KEY_VARIABLES)} from the environment"
    )
    group.add_argument("--model", metavar="NAME", help="default: the first that the server has")
    add_sampling_arguments(parser, "server")


def make_client(args: argparse.Namespace) -> OpenAIClient:
    """A client of the server that the flags name."""
    from moe_runtime.openai_client import OpenAIClient

    return OpenAIClient(args.base_url, given_api_key(args))


def given_api_key(args: argparse.Namespace) -> str | None:
    """From --api-key, else from the environment."""
    from_environment = (os.environ.get(name) for name in KEY_VARIABLES)
    return args.api_key if args.api_key is not None else next(filter(None, from_environment), None)


def read_stdin(flag: str) -> str:
    """All of standard input, which is no terminal; ConfigError, naming the flag to give instead, if it is empty."""
    text = sys.stdin.read()
    if not text.strip():
        raise ConfigError(f"standard input is empty; write the text to it, or give {flag} TEXT")
    return text


def read_line(prompt: str) -> str | None:
    """A line from the terminal; None at its end (Ctrl-D), and "" for one that Ctrl-C gave up."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` line editing and a history
    try:
        return input(prompt)
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""
