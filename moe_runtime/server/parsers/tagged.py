"""Text with calls between tags in it: what the formats of calls have in common."""

from __future__ import annotations

import re
from abc import abstractmethod

from moe_runtime.server.parsers.reader import SPACE, Reading
from moe_runtime.server.parsers.stream import StreamParser

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

TO_LAST_WORD = re.compile(r"[^<]*[^< \t\r\n]")


class TaggedParser(StreamParser):
    """Content with calls in it.

    White space around calls is part of them, so an answer that is only calls has no content; but between two
    texts with a call between them, what follows the call stays. What turns out to be no call is content.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._space: list[str] = []  # white space read last, of which it is not yet known whose it is
        self._after_call = False

    @abstractmethod
    def _read_call(self) -> Reading[str | None]:
        """Read the call that may begin at this "<".

        Returns:
            None if there was one, all of it has been read and the sink told; the text read if there was none.
        """

    def _read(self) -> Reading[None]:
        while char := (yield from self._reader.peek()):
            if char == "<":
                text = yield from self._read_call()
                if text is None:
                    self._space, self._after_call = [], True
                else:
                    self._put_content(text)
            elif text := self._reader.take(TO_LAST_WORD):
                self._put_content(text)
            else:
                self._space.append(self._reader.take(SPACE))
        if not self._after_call:
            self._put_content("")

    def _put_content(self, text: str) -> None:
        self._sink.content("".join(self._space) + text)
        self._space, self._after_call = [], False

    def _read_end(self, junk: re.Pattern[str] = SPACE) -> Reading[None]:
        """After a call: read </tool_call>, and `junk` before it, if they come next; half a tag at the end too."""
        before = yield from self._reader.run(junk)
        tag, text = yield from self._reader.tag((CALL_END,))
        if not tag and (yield from self._reader.peek()):
            self._reader.unread(before + text)
