"""Calls that structured output enforced, so that the whole answer is JSON of `tool_choice_schema`."""

from __future__ import annotations

from moe_runtime.server.parsers.call_object import CallObject
from moe_runtime.server.parsers.json_text import copy_value
from moe_runtime.server.parsers.reader import SPACE, Reading
from moe_runtime.server.parsers.stream import StreamParser


class RequiredCallsParser(StreamParser):
    """An array of {"name": ..., "parameters": {...}}; from where the text is no such array, it is content."""

    def _read(self) -> Reading[None]:
        space = yield from self._reader.run(SPACE)
        if (yield from self._reader.peek()) == "[":
            self._reader.read()
            yield from self._read_calls()
        else:
            self._sink.content(space)
        yield from self._read_content()

    def _read_calls(self) -> Reading[None]:
        """Read to the end of the array and of the white space after it."""
        while char := (yield from self._read_space()):
            if char == "{":
                self._reader.keep()
                call = CallObject(self._reader, self._sink)
                yield from call.read()
                text = self._reader.kept()
                if not call.is_call:
                    self._sink.content(text)
                    return
            elif char in ",]":
                self._reader.read()
                if char == "]":
                    yield from self._read_space()
                    return
            else:
                return

    def _read_space(self) -> Reading[str]:
        yield from self._reader.run(SPACE)
        return (yield from self._reader.peek())


class NamedCallParser(StreamParser):
    """The arguments of one call of one function; if the text begins with no object, all of it is content."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _read(self) -> Reading[None]:
        space = yield from self._reader.run(SPACE)
        if (yield from self._reader.peek()) == "{":
            self._sink.start_call(self._name)
            yield from copy_value(self._reader, self._sink.arguments)
            yield from self._reader.run(SPACE)
        else:
            self._sink.content(space)
        yield from self._read_content()
