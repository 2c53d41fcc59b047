"""A call written as a JSON object: {"name": ..., "arguments": {...}}."""

from __future__ import annotations

from collections.abc import Collection

from moe_runtime.server.parsers.deltas import DeltaSink
from moe_runtime.server.parsers.json_text import (
    copy_value,
    read_line_string,
    skip_value,
    unwrap_string,
)
from moe_runtime.server.parsers.reader import SPACE, Reading, TextReader

_ARGUMENT_KEYS = ("arguments", "parameters")


class CallObject:
    """Reads one call: its name goes to the sink as soon as it is read, its arguments as they are read.

    Arguments that come before the name wait for it. Other keys are passed over.
    """

    def __init__(self, reader: TextReader, sink: DeltaSink, ends: Collection[str] = ()) -> None:
        """`ends`: tags that end the object however incomplete it is."""
        self._reader = reader
        self._sink = sink
        self._ends = ends
        self._waiting: list[str] = []  # arguments that came before the name
        self._has_arguments = False
        self.is_call = False  # the sink has been told; until then, what was read may be no call at all

    def read(self) -> Reading[None]:
        """Read from "{" to "}", or to where the text stops being such an object."""
        self._reader.read()
        while (yield from self._read_pair()):
            char = yield from self._read_space()
            if char == "}":
                self._reader.read()
                if not self._has_arguments:
                    self._put("{}")
            if char != ",":
                return
            self._reader.read()

    def _read_pair(self) -> Reading[bool]:
        """Read a key and its value; False if they are not complete."""
        yield from self._read_space()
        key = yield from read_line_string(self._reader)
        if key is None or (yield from self._read_space()) != ":":
            return False
        self._reader.read()
        yield from self._read_space()
        if key == "name" and not self.is_call:
            return (yield from self._read_name())
        if key in _ARGUMENT_KEYS and not self._has_arguments:
            return (yield from self._read_arguments())
        return (yield from skip_value(self._reader, self._ends))

    def _read_name(self) -> Reading[bool]:
        name = ((yield from read_line_string(self._reader)) or "").strip()
        if not name:
            return False
        self.is_call = True
        self._sink.start_call(name)
        self._sink.arguments("".join(self._waiting))
        return True

    def _read_arguments(self) -> Reading[bool]:
        self._has_arguments = True
        if (yield from self._reader.peek()) in ("{", "["):
            return (yield from copy_value(self._reader, self._put, self._ends))
        pieces: list[str] = []
        complete = yield from copy_value(self._reader, pieces.append, self._ends)
        value = "".join(pieces)
        self._put("{}" if value in ("null", "None") else unwrap_string(value) if complete else value)
        return complete

    def _put(self, arguments: str) -> None:
        if self.is_call:
            self._sink.arguments(arguments)
        else:
            self._waiting.append(arguments)

    def _read_space(self) -> Reading[str]:
        """Read white space; the character after it, not read."""
        yield from self._reader.run(SPACE)
        return (yield from self._reader.peek())
