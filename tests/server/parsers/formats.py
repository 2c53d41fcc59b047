"""Calls written as Qwen's published chat templates write them, and parsing them however the text is split."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.server.parsers import OutputParser, ParsedDelta, ToolCallDelta, fold

MakeParser = Callable[[], OutputParser]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a text means, without the random ids of its calls."""

    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # name, arguments
    reasoning: str = ""


def calls_of(delta: ParsedDelta) -> tuple[tuple[str, str], ...]:
    return tuple((call.name or "", call.arguments) for call in delta.tool_calls)


def parse(parser: OutputParser, *pieces: str) -> Answer:
    """The meaning of a text that comes in `pieces`; fails where the stream breaks OpenAI's rules."""
    deltas = [*map(parser.feed, pieces), parser.finish()]
    check_stream([call for delta in deltas for call in delta.tool_calls])
    whole = fold(deltas)
    return Answer(whole.content, calls_of(whole), whole.reasoning)


def check_stream(pieces: list[ToolCallDelta]) -> None:
    """Calls come one after the other; the first delta of each, and no other, has its id and name."""
    begun = -1
    for piece in pieces:
        if piece.index != begun:
            begun += 1
            assert piece.index == begun
            assert piece.name
            assert piece.id is not None
            assert len(piece.id) == len("call_") + 24
        else:
            assert piece.name is None
            assert piece.id is None
            assert piece.arguments


def splits(text: str, *, seed: int = 0) -> Iterator[list[str]]:
    """The text in two at every place, character by character, and in random pieces."""
    for i in range(1, len(text)):
        yield [text[:i], text[i:]]
    yield list(text)
    draw = random.Random(seed)
    for _ in range(8):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(1, 12)))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def parse_all_ways(make: MakeParser, text: str) -> Answer:
    """The meaning of `text`, which is the same however it is split."""
    whole = parse(make(), text)
    for pieces in splits(text):
        assert parse(make(), *pieces) == whole, pieces
    return whole


def hermes_call(name: str, arguments: Mapping[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def coder_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Strings stand as they are, everything else as JSON."""
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool as chat completions describe it; a property is a type's name or a schema."""
    schemas = {key: {"type": p} if isinstance(p, str) else p for key, p in properties.items()}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": schemas}},
    }
