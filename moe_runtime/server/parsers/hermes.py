"""Calls in the format of Hermes, Qwen2.5 and Qwen3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import re

from moe_runtime.server.parsers.call_object import CallObject
from moe_runtime.server.parsers.reader import SPACE, Reading
from moe_runtime.server.parsers.tagged import CALL_BEGIN, CALL_END, TaggedParser

_BRACKETS_TOO_MANY = re.compile(r"[ \t\r\n}\]]+")


class HermesParser(TaggedParser):
    """A <tool_call> is a call once its object's name has been read; until then all of it may be content."""

    def _read_call(self) -> Reading[str | None]:
        self._reader.keep()
        tag, _ = yield from self._reader.tag((CALL_BEGIN,))
        if not tag:
            return self._reader.kept()
        yield from self._reader.run(SPACE)
        if (yield from self._reader.peek()) != "{":
            return self._reader.kept()
        call = CallObject(self._reader, self._sink, ends=(CALL_BEGIN, CALL_END))
        yield from call.read()
        text = self._reader.kept()
        if not call.is_call:
            return text
        yield from self._read_end(_BRACKETS_TOO_MANY)
        return None
