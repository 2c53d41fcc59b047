"""Flags of the commands that are clients of a server, and the client that they ask for."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_runtime.cli.own_server import is_answered, own_server
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
        metavar="URL",
        help=f"with its /v1 (default: {_DEFAULT_BASE_URL}, or where none answers a server of the command's own)",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help=f"default: {' or '.join(KEY_VARIABLES)} from the environment"
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="default: the first that the server has; for a server of the command's own a checkpoint directory or "
        "Hub id (default: the demo checkpoint)",
    )
    add_sampling_arguments(parser, "server")


@contextlib.contextmanager
def connected(args: argparse.Namespace) -> Iterator[OpenAIClient]:
    """A client of the server that --base-url names, of the default one, or of one that runs for this block.

    Raises:
        ServerError: a server of our own did not start, or the API key cannot be sent.
    """
    from moe_runtime.openai_client import OpenAIClient

    api_key = given_api_key(args)
    base_url = _DEFAULT_BASE_URL if args.base_url is None else args.base_url
    with OpenAIClient(base_url, api_key) as client:
        if args.base_url is not None or is_answered(base_url):
            yield client
            return
    print(
        f"moe-runtime: no server answers at {base_url}; starting one for "
        f"{args.model or 'the demo checkpoint'}",
        file=sys.stderr,
    )
    with own_server(args.model, api_key) as own_url, OpenAIClient(own_url, api_key) as client:
        yield client


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
