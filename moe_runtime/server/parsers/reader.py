"""Text that is still arriving, read by generators that wait where it runs out."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

# A generator that yields whenever all the text at hand has been read and more is needed, and returns a T. What
# it does cannot depend on where the text was split, because it never sees a split.
Reading: TypeAlias = Generator[None, None, T]

SPACE = re.compile(r"[ \t\r\n]+")
NEWLINES = re.compile(r"[\r\n]+")
ANYTHING = re.compile(r".+", re.DOTALL)


class TextReader:
    """The text between what has been read and what has arrived, which is none while a Reading waits."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._kept: list[str] | None = None

    def put(self, text: str) -> None:
        """More text has arrived; what came before must all have been read."""
        assert self._at == len(self._text), "text was left unread"
        assert not self._ended, "text after the end"
        self._text, self._at = text, 0

    def end(self) -> None:
        """No more text will arrive."""
        self._ended = True

    def peek(self) -> Reading[str]:
        """The next character, not read; "" at the end of the text."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def read(self, count: int = 1) -> str:
        """Read `count` characters, which must be at hand."""
        piece = self._text[self._at : self._at + count]
        assert len(piece) == count
        self._at += count
        if self._kept is not None:
            self._kept.append(piece)
        return piece

    def take(self, pattern: re.Pattern[str]) -> str:
        """Read what `pattern` matches of the text at hand, "" if nothing; there may be more of it to come."""
        found = pattern.match(self._text, self._at)
        return self.read(found.end() - self._at) if found else ""

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read all that `pattern`, a set of characters repeated, matches, to the first that it does not."""
        pieces = []
        while (yield from self.peek()) and (piece := self.take(pattern)):
            pieces.append(piece)
        return "".join(pieces)

    def tag(self, tags: Collection[str]) -> Reading[tuple[str, str]]:
        """Read one of `tags`, none of which begins another: (the tag, or "" if there is none; what was read)."""
        read = ""
        while read not in tags:
            char = yield from self.peek()
            if not char or not any(tag.startswith(read + char) for tag in tags):
                return "", read
            read += self.read()
        return read, read

    def unread(self, text: str) -> None:
        """Step back over `text`, which must be what was read last."""
        if self._kept is not None:
            self._kept = ["".join(self._kept).removesuffix(text)]
        if self._at >= len(text):
            self._at -= len(text)
        else:  # part of it came with earlier text
            self._text, self._at = text + self._text[self._at :], 0

    def keep(self) -> None:
        """Remember all that is read from now on."""
        self._kept = []

    def kept(self) -> str:
        """What has been read since `keep`, which ends with this."""
        assert self._kept is not None
        kept, self._kept = "".join(self._kept), None
        return kept
