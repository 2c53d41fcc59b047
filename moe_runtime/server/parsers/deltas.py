"""What a parser gives back: pieces of content, of reasoning and of tool calls, and folding them into a whole."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of one tool call."""

    index: int  # of the call in its message, from 0
    id: str | None = None  # on the call's first delta only
    name: str | None = None  # on the call's first delta only
    arguments: str = ""  # the pieces of one call concatenate to the arguments as JSON text


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedDelta:
    """What a piece of a model's text means; of a whole answer, each call is one delta."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


NOTHING = ParsedDelta()


class OutputParser(Protocol):
    """Turns a model's text, in whatever pieces it comes, into content, reasoning and tool calls."""

    def feed(self, text: str) -> ParsedDelta:
        """Take more text; what is now known of its meaning. Text that may yet become a tag is held back."""
        ...

    def finish(self) -> ParsedDelta:
        """The text has ended; what was held back. Nothing may be fed after it."""
        ...


def fold(deltas: Iterable[ParsedDelta]) -> ParsedDelta:
    """One delta that says what all of them say, with one ToolCallDelta a call."""
    content, reasoning = [], []
    calls: dict[int, _Call] = {}
    for delta in deltas:
        content.append(delta.content)
        reasoning.append(delta.reasoning)
        for piece in delta.tool_calls:
            call = calls.setdefault(piece.index, _Call(piece.index, piece.id, piece.name))
            call.pieces.append(piece.arguments)
    return ParsedDelta(
        content="".join(content),
        reasoning="".join(reasoning),
        tool_calls=tuple(call.delta() for call in calls.values()),
    )


class DeltaSink:
    """Collects what a parser finds until it is handed on."""

    def __init__(self, max_calls: int | None = None) -> None:
        """Of more than `max_calls` calls, those beyond are swallowed; None: no limit."""
        self._max_calls = max_calls
        self._num_calls = 0
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []

    def content(self, text: str) -> None:
        """Add text of the answer."""
        self._content.append(text)

    def reasoning(self, text: str) -> None:
        """Add text of the reasoning."""
        self._reasoning.append(text)

    def start_call(self, name: str) -> None:
        """Begin the next call; `arguments` belongs to it from now on."""
        self._num_calls += 1
        if self._is_heard():
            self._calls.append(_Call(self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name))

    def arguments(self, text: str) -> None:
        """Add JSON text to the arguments of the call begun last."""
        if not text or not self._is_heard():
            return
        if not self._calls:
            self._calls.append(_Call(self._num_calls - 1))
        self._calls[-1].pieces.append(text)

    def drain(self) -> ParsedDelta:
        """What has been added since the last time."""
        if not (self._content or self._reasoning or self._calls):
            return NOTHING
        delta = ParsedDelta(
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(call.delta() for call in self._calls),
        )
        self._content, self._reasoning, self._calls = [], [], []
        return delta

    def _is_heard(self) -> bool:
        return self._max_calls is None or self._num_calls <= self._max_calls


@dataclass(slots=True)
class _Call:
    index: int
    id: str | None = None
    name: str | None = None
    pieces: list[str] = field(default_factory=list)

    def delta(self) -> ToolCallDelta:
        return ToolCallDelta(index=self.index, id=self.id, name=self.name, arguments="".join(self.pieces))
