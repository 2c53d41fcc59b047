"""JSON read as it arrives: passed on piece by piece, with the slips that models make in strings put right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from moe_runtime.server.parsers.reader import SPACE, Reading, TextReader

Put = Callable[[str], None]

_OUTSIDE_STRINGS = re.compile(r'[^"{}\[\]<]+')
_INSIDE_STRINGS = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r'[^\s,:"{}\[\]<]+')
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")


def escape(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string; pieces may be escaped one by one."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def is_json(text: str) -> bool:
    """Whether `text` is JSON by the letter: no NaN, and not nested too deeply for Python's own parser."""
    try:
        # Numbers stay text: Python refuses to convert integers of thousands of digits.
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def copy_value(reader: TextReader, put: Put, ends: Collection[str] = ()) -> Reading[bool]:
    """Pass the JSON value at the reader on to `put`; False if it is not complete.

    Brackets are only counted, so the value may be malformed; it is passed on all the same. It stops before any
    of the tags `ends` that stands outside strings, or at the start of a line: strings of JSON have no raw line
    breaks, so such a string lacks its closing quote. Other raw control characters, and backslashes that
    begin no escape, are escaped.
    """
    depth = 0
    while char := (yield from reader.peek()):
        if char == '"':
            if not (yield from _copy_string(reader, put, ends)):
                return False
        elif char in "{[":
            depth += 1
            put(reader.read())
        elif depth == 0:
            scalar = yield from reader.run(_SCALAR)
            put(scalar)
            return bool(scalar)
        elif char in "}]":
            depth -= 1
            put(reader.read())
        elif char == "<":
            tag, text = yield from reader.tag(ends)
            if tag:
                reader.unread(tag)
                return False
            put(text or reader.read())
        else:
            put(reader.take(_OUTSIDE_STRINGS))
        if depth == 0:
            return True
    return False


def _copy_string(reader: TextReader, put: Put, ends: Collection[str]) -> Reading[bool]:
    put(reader.read())
    while char := (yield from reader.peek()):
        if char == '"':
            put(reader.read())
            return True
        if char == "\\":
            reader.read()
            put((yield from _read_escape(reader)))
        elif char in "\r\n":
            space = yield from reader.run(SPACE)
            tag, text = yield from reader.tag(ends)
            if tag:
                reader.unread(tag)
                return False
            put(escape(space + text))
        elif char < " ":
            put(escape(reader.read()))
        else:
            put(reader.take(_INSIDE_STRINGS))
    return False


def _read_escape(reader: TextReader) -> Reading[str]:
    """The escape whose backslash has been read, made valid; "" if the text ends in it."""
    char = yield from reader.peek()
    if char in ("", "'"):
        return ""
    if char == "u":
        return (yield from _read_code_unit(reader))
    return "\\" + reader.read() if char in '"\\/bfnrt' else "\\\\"


def _read_code_unit(reader: TextReader) -> Reading[str]:
    read = reader.read()
    while len(read) < 5:
        char = yield from reader.peek()
        if not char:
            return ""
        if char not in _HEX_DIGITS:
            return "\\\\" + read
        read += reader.read()
    return "\\" + read


def read_line_string(reader: TextReader) -> Reading[str | None]:
    """The JSON string at the reader, decoded; None where there is none, or where it is cut or broken by a line."""
    if (yield from reader.peek()) != '"':
        return None
    pieces = [reader.read()]
    while (char := (yield from reader.peek())) >= " ":
        if char == "\\":
            pieces.append(reader.read())
            if not (yield from reader.peek()):
                return None
            pieces.append(reader.read())
        elif char == '"':
            return _decoded("".join(pieces) + reader.read())
        else:
            pieces.append(reader.take(_INSIDE_STRINGS))
    return None


def _decoded(string: str) -> str | None:
    try:
        value = json.loads(string)
        if isinstance(value, str):
            value.encode()  # half a surrogate pair cannot be sent to anyone
            return value
    except ValueError:
        pass
    return None


def skip_value(reader: TextReader, ends: Collection[str] = ()) -> Reading[bool]:
    """Read the JSON value at the reader; False if it is not complete."""
    return copy_value(reader, lambda _: None, ends)


def unwrap_string(text: str) -> str:
    """The JSON inside `text` if that is a JSON string with a JSON object in it (encoded twice), or else `text`."""
    inner = (_decoded(text) or "").strip()
    return inner if inner.startswith("{") and is_json(inner) else text
