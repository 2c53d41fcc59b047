"""`moe-runtime chat`: talk to a model that some server serves."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.client_args import add_client_arguments, connected, read_line, read_stdin
from moe_runtime.cli.sampling_args import given_sampling
from moe_runtime.errors import ServerError

if TYPE_CHECKING:
    from moe_runtime.openai_client import OpenAIClient

_HELP = "/reset begins anew, /exit (or Ctrl-D) ends; Ctrl-C stops an answer"
_DIM, _PLAIN = "\033[2m", "\033[0m"


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model that a server serves",
        description="Talk to a model behind any OpenAI-compatible server; where none answers, and no --base-url is "
        "given, one is started until the command ends. Without --message the messages come from the terminal, or "
        "one from standard input where that is no terminal.",
    )
    parser.add_argument(
        "--message",
        action="append",
        metavar="TEXT",
        help="ask this and leave; may be given several times, for a conversation",
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="message of the system, before all others")
    add_client_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    messages = args.message
    interactive = messages is None and sys.stdin.isatty()
    if messages is None and not interactive:
        messages = [read_stdin("--message")]
    with connected(args) as client:
        model = args.model or client.models()[0]
        conversation = Conversation(client, model, args.system_prompt, given_sampling(args))
        if interactive:
            print(f"{model}: {_HELP}")
            _talk(conversation)
        else:
            for message in messages:
                conversation.ask(message)
    return 0


class Conversation:
    """What was said so far, and saying more."""

    def __init__(
        self, client: OpenAIClient, model: str, system_prompt: str | None, sampling: dict[str, Any]
    ) -> None:
        self._client = client
        self._body = {"model": model, **sampling}
        self._opening = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self._messages = list(self._opening)

    def ask(self, message: str) -> None:
        """Send a message and print the answer as it comes.

        Raises:
            ServerError: there is no whole answer; the message is as good as not sent.
            KeyboardInterrupt: the answer was stopped; what came of it counts.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        answer: list[str] = []
        try:
            for delta in self._deltas(messages):
                _print_reasoning(delta)
                if text := delta.get("content"):
                    answer.append(text)
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
            raise
        finally:
            print(flush=True)
        self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _deltas(self, messages: list[dict[str, str]]) -> Any:
        reason = None
        for chunk in self._client.stream("/chat/completions", {**self._body, "messages": messages}):
            for choice in chunk.get("choices") or ():
                yield choice.get("delta") or {}
                reason = choice.get("finish_reason") or reason
        if reason == "length":
            print(" (cut off: the answer has as many tokens as it may have)", end="", file=sys.stderr)


def _print_reasoning(delta: dict[str, Any]) -> None:
    """Shown on a terminal only: a file is to hold the answer."""
    text = delta.get("reasoning_content") or delta.get("reasoning")
    if text and sys.stdout.isatty():
        print(f"{_DIM}{text}{_PLAIN}", end="", flush=True)


def _talk(conversation: Conversation) -> None:
    """Until /exit or the end of input."""
    while (line := read_line("> ")) is not None:
        words = line.strip()
        if words == "/exit":
            return
        if words == "/reset":
            conversation.reset()
        elif words.startswith("/"):
            print(_HELP)
        elif words:
            try:
                conversation.ask(line)
            except KeyboardInterrupt:
                continue
            except ServerError as error:
                print(f"moe-runtime: {error}", file=sys.stderr)
