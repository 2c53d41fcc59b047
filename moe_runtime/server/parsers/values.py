"""Text of a parameter into the JSON that its type calls for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from moe_runtime.server.parsers.json_text import Put, escape, is_json
from moe_runtime.server.parsers.schema_types import JsonType

_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?([eE][+-]?[0-9]+)?")
_NULLS = ("null", "None")  # as JSON, and as a template prints Python's
_PYTHON_TOKEN = re.compile(
    r"""(?P<string>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|(?P<name>True|False|None)|(?P<rest>[\s\[\]{}:,0-9.eE+-]+)"""
)
_HEX = "[0-9a-fA-F]"
_PYTHON_STRING_PART = re.compile(
    rf"""[^"\\\x00-\x1f]+|\\(?:x(?P<x>{_HEX}{{2}})|u(?P<u>{_HEX}{{4}})|U(?P<U>{_HEX}{{8}}))|\\.|.""",
    re.DOTALL,
)
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}


class ValueWriter:
    """Writes one parameter's value as JSON: a string as it comes, what has another type when it is complete.

    A value that fits none of its types becomes a string.
    """

    def __init__(self, types: Sequence[JsonType], put: Put) -> None:
        self._types = types
        self._put = put
        self._held: list[str] | None = []  # None: it is a string, and what there was of it has been written
        self._is_string = next((t for t in types if t != "null"), "null") == "string"

    def write(self, text: str) -> None:
        """Take more of the value's text."""
        if self._held is None:
            self._put(escape(text))
            return
        self._held.append(text)
        if self._is_string and not self._may_be_null():
            self._begin_string()

    def close(self) -> None:
        """The value is complete."""
        if self._held is None:
            self._put('"')
            return
        text = "".join(self._held)
        converted = (_CONVERT[t](text.strip()) for t in self._tried())
        json_text = next((c for c in converted if c is not None), None)
        self._put(f'"{escape(text)}"' if json_text is None else json_text)

    def cut(self) -> None:
        """The text ends within the value: write what there is of it."""
        if self._held is None:
            return
        if not self._is_string:
            self._put("".join(self._held).strip())
        elif not self._may_be_null():
            self._begin_string()

    def _begin_string(self) -> None:
        assert self._held is not None
        self._put('"' + escape("".join(self._held)))
        self._held = None

    def _may_be_null(self) -> bool:
        """Whether what is held, which is then short, may yet become null."""
        held = "".join(self._held or ())
        return "null" in self._types and any(null.startswith(held) for null in _NULLS)

    def _tried(self) -> list[JsonType]:
        """Types to try, in the schema's order: up to string, which every text is, but null in any case."""
        tried = list(self._types)
        if "string" in tried:
            tried = tried[: tried.index("string")] + [t for t in tried if t == "null"]
        return tried


def _null(text: str) -> str | None:
    return "null" if text in _NULLS else None


def _boolean(text: str) -> str | None:
    return text.lower() if text.lower() in ("true", "false") else None


def _integer(text: str) -> str | None:
    found = _NUMBER.fullmatch(text)
    if not found or not found[2] or found[4] or (found[3] or "").strip("0"):
        return None
    digits = found[2].lstrip("0") or "0"
    return "-" + digits if found[1] == "-" and digits != "0" else digits


def _number(text: str) -> str | None:
    """Digit by digit, so that no precision is lost."""
    found = _NUMBER.fullmatch(text)
    if not found or not (found[2] or found[3]):
        return None
    sign, whole, fraction, exponent = found[1], found[2].lstrip("0") or "0", found[3], found[4] or ""
    return ("-" if sign == "-" else "") + whole + ("." + fraction if fraction else "") + exponent


def _object(text: str) -> str | None:
    return _container(text, "{")


def _array(text: str) -> str | None:
    return _container(text, "[")


def _container(text: str, opening: str) -> str | None:
    if not text.startswith(opening):
        return None
    if is_json(text):
        return text
    from_python = _python_to_json(text)
    return from_python if from_python is not None and is_json(from_python) else None


def _python_to_json(text: str) -> str | None:
    """Python's way of writing dicts and lists, token by token as JSON; templates print such."""
    pieces, at = [], 0
    while at < len(text):
        token = _PYTHON_TOKEN.match(text, at)
        if not token:
            return None
        at = token.end()
        if token["string"]:
            inside = token["string"][1:-1]
            pieces.append('"' + _PYTHON_STRING_PART.sub(_json_string_part, inside) + '"')
        else:
            pieces.append(_PYTHON_NAMES[token["name"]] if token["name"] else token["rest"])
    return "".join(pieces)


def _json_string_part(part: re.Match[str]) -> str:
    text = part[0]
    if code := part["x"] or part["u"] or part["U"]:
        return _escaped_character(int(code, 16))
    if text[0] != "\\":
        return escape(text)
    if text[1] == "'":
        return "'"
    return text if text[1] in '"\\nrtbf' else "\\\\" + text[1:]


def _escaped_character(code: int) -> str:
    # Half a surrogate pair stays an escape, which can be sent; the other half may follow.
    if code > sys.maxunicode or 0xD800 <= code < 0xE000:
        return f"\\u{code & 0xFFFF:04x}"
    return escape(chr(code))


_CONVERT: dict[JsonType, Callable[[str], str | None]] = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _object,
    "array": _array,
}
