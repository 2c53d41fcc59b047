"""Parsers written as one Reading of the whole text, and the simplest of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moe_runtime.server.parsers.deltas import DeltaSink, ParsedDelta
from moe_runtime.server.parsers.reader import ANYTHING, Reading, TextReader


class StreamParser(ABC):
    """An OutputParser whose subclass says how the text is read from its first character to its last.

    The cost is linear in the text if the subclass reads each character a bounded number of times.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self._reader = TextReader()
        self._sink = DeltaSink(max_calls)
        self._reading = self._read()

    def feed(self, text: str) -> ParsedDelta:
        if text:
            self._reader.put(text)
            next(self._reading, None)
        return self._sink.drain()

    def finish(self) -> ParsedDelta:
        self._reader.end()
        next(self._reading, None)
        return self._sink.drain()

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read all of the text, telling the sink what it is."""

    def _read_content(self) -> Reading[None]:
        while (yield from self._reader.peek()):
            self._sink.content(self._reader.take(ANYTHING))


class ContentParser(StreamParser):
    """All text is content."""

    def _read(self) -> Reading[None]:
        return self._read_content()
