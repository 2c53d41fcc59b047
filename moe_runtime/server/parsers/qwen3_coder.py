"""Calls in Qwen3-Coder's format: <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moe_runtime.server.parsers.json_text import escape
from moe_runtime.server.parsers.reader import SPACE, Reading
from moe_runtime.server.parsers.schema_types import Schema, parameter_types
from moe_runtime.server.parsers.tagged import CALL_BEGIN, CALL_END, TO_LAST_WORD, TaggedParser
from moe_runtime.server.parsers.values import ValueWriter

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"[^<>\r\n]+")
_PLAIN_VALUE = re.compile(r"[^\n<]+")


class Qwen3CoderParser(TaggedParser):
    """A <tool_call><function=NAME> is a call.

    A <function=NAME> alone is one if a parameter or the function's end follows, for models forget <tool_call>;
    and where it is known which functions there are, NAME must be one of them. Text between parameters is content.
    """

    def __init__(self, functions: Mapping[str, Schema], max_calls: int | None = None) -> None:
        """`functions`: schema of the parameters of each function, which says what types the values have."""
        super().__init__(max_calls)
        self._functions = functions
        self._schema: Schema = {}  # of the function that is being called
        self._given: set[str] = set()  # parameters of this call that have been read

    def _read_call(self) -> Reading[str | None]:
        self._reader.keep()
        tag, _ = yield from self._reader.tag((CALL_BEGIN, _FUNCTION))
        is_wrapped = tag == CALL_BEGIN
        if is_wrapped:
            yield from self._reader.run(SPACE)
            tag, _ = yield from self._reader.tag((_FUNCTION,))
        name = (yield from self._read_name()) if tag else ""
        text = self._reader.kept()
        if not name or not (is_wrapped or (yield from self._is_call(name))):
            return text
        self._sink.start_call(name)
        self._schema = self._functions.get(name, {})
        self._given = set()
        yield from self._read_function()
        return None

    def _read_name(self) -> Reading[str]:
        """Read the rest of "<tag=NAME>"; the name, or "" if it is none."""
        name = (yield from self._reader.run(_NAME)).strip()
        if (yield from self._reader.peek()) != ">":
            return ""
        self._reader.read()
        return name

    def _is_call(self, name: str) -> Reading[bool]:
        """Whether a "<function=NAME>" without <tool_call>, just read, begins a call."""
        if self._functions and name not in self._functions:
            return False
        space = yield from self._reader.run(SPACE)
        tag, text = yield from self._reader.tag((_PARAMETER, _FUNCTION_END))
        self._reader.unread(space + text)
        return bool(tag)

    def _read_function(self) -> Reading[None]:
        """Read parameters up to the end of the function, or to where another call begins."""
        while True:
            space = yield from self._reader.run(SPACE)
            tag, text = yield from self._reader.tag(
                (_PARAMETER, _FUNCTION_END, CALL_END, CALL_BEGIN, _FUNCTION)
            )
            if tag == _PARAMETER:
                if not (yield from self._read_parameter()):
                    return
            elif tag:
                self._sink.arguments("}" if self._given else "{}")
                if tag == _FUNCTION_END:
                    yield from self._read_end()
                elif tag != CALL_END:
                    self._reader.unread(tag)
                return
            elif (yield from self._reader.peek()):
                self._sink.content(space + text + self._reader.take(TO_LAST_WORD))
            else:
                return

    def _read_parameter(self) -> Reading[bool]:
        """Read the rest of a parameter; False if the text ended within it."""
        self._reader.keep()
        name = yield from self._read_name()
        text = self._reader.kept()
        if not name:
            if (yield from self._reader.peek()):
                self._sink.content(_PARAMETER + text)
            return True
        self._sink.arguments(f'{", " if self._given else "{"}"{escape(name)}": ')
        self._given.add(name)
        value = ValueWriter(parameter_types(self._schema, name), self._sink.arguments)
        complete = yield from self._read_value(value)
        if complete:
            value.close()
        else:
            value.cut()
        return complete

    def _read_value(self, value: ValueWriter) -> Reading[bool]:
        """Read a value and what ends it, without the line breaks around it; False if the text ends first."""
        if (yield from self._reader.peek()) == "\n":
            self._reader.read()
        line_break = ""  # read, but perhaps part of the end
        while char := (yield from self._reader.peek()):
            if char == "\n":
                value.write(line_break)
                line_break = self._reader.read()
            elif char == "<":
                is_end, text = yield from self._read_value_end(bool(line_break))
                if is_end:
                    return True
                if not (yield from self._reader.peek()):
                    return False
                value.write(line_break + text)
                line_break = ""
            else:
                value.write(line_break + self._reader.take(_PLAIN_VALUE))
                line_break = ""
        return False

    def _read_value_end(self, at_line: bool) -> Reading[tuple[bool, str]]:
        """Whether the value ends at this "<"; the text read if not.

        Values may have tags in them, so </parameter> ends one only if what must come after it does. For
        models that forget </parameter>, a line that begins with a parameter that is declared and not yet
        given, or with the function's end and that of the call, ends one too.
        """
        tag, text = yield from self._reader.tag((_PARAMETER_END, _PARAMETER, _FUNCTION_END))
        if tag == _PARAMETER_END:
            is_end = yield from self._is_followed_by(
                (_PARAMETER, _FUNCTION_END, CALL_END, CALL_BEGIN, _FUNCTION)
            )
        elif tag == _FUNCTION_END and at_line:
            is_end = yield from self._is_followed_by((CALL_END, CALL_BEGIN))
            if is_end:
                self._reader.unread(tag)
        elif tag == _PARAMETER and at_line:
            is_end = yield from self._is_new_parameter()
            if is_end:
                self._reader.unread(tag)
        else:
            is_end = False
        return is_end, text

    def _is_followed_by(self, tags: tuple[str, ...]) -> Reading[bool]:
        """Whether one of `tags`, or the end of the text, comes next but for white space."""
        space = yield from self._reader.run(SPACE)
        tag, text = yield from self._reader.tag(tags)
        is_next = bool(tag) or not (yield from self._reader.peek())
        self._reader.unread(space + text)
        return is_next

    def _is_new_parameter(self) -> Reading[bool]:
        name = yield from self._reader.run(_NAME)
        is_closed = (yield from self._reader.peek()) == ">"
        self._reader.unread(name)
        properties = self._schema.get("properties")
        is_declared = isinstance(properties, Mapping) and name.strip() in properties
        return is_closed and is_declared and name.strip() not in self._given
