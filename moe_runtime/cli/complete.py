"""`moe-runtime complete`: have a model that some server serves continue a text."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.client_args import add_client_arguments, connected, read_line, read_stdin
from moe_runtime.cli.sampling_args import given_sampling
from moe_runtime.errors import ServerError

if TYPE_CHECKING:
    from moe_runtime.openai_client import OpenAIClient


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "complete",
        help="have a model that a server serves continue a text",
        description="Have a model behind any OpenAI-compatible server continue a text; where none answers, and no "
        "--base-url is given, one is started until the command ends. Without --prompt the texts are lines from the "
        "terminal, or one text is all of standard input where that is no terminal.",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="continue this and leave")
    add_client_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    prompt = args.prompt
    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = read_stdin("--prompt")
    with connected(args) as client:
        body = {"model": args.model or client.models()[0], **given_sampling(args)}
        if not interactive:
            _complete(client, body, prompt)
            return 0
        print(f"{body['model']}: each line is continued; /exit (or Ctrl-D) ends, Ctrl-C stops a text")
        while (line := read_line("> ")) is not None and line.strip() != "/exit":
            if line.strip():
                _complete_line(client, body, line)
    return 0


def _complete_line(client: OpenAIClient, body: dict[str, Any], line: str) -> None:
    """Errors and Ctrl-C end this text only."""
    try:
        _complete(client, body, line)
    except KeyboardInterrupt:
        pass
    except ServerError as error:
        print(f"moe-runtime: {error}", file=sys.stderr)


def _complete(client: OpenAIClient, body: dict[str, Any], prompt: str) -> None:
    try:
        for chunk in client.stream("/completions", {**body, "prompt": prompt}):
            for choice in chunk.get("choices") or ():
                print(choice.get("text") or "", end="", flush=True)
    finally:
        print(flush=True)
