"""Checks of a regular expression: what the grammar compiler would take in another sense than Python and ECMAScript.

The compiler refuses look-around, back references, word boundaries and flags by itself, but it matches unknown
escapes as the letter itself and, inside of JSON strings, it lets quotes through.
"""

from __future__ import annotations

import re

from moe_runtime.errors import ConfigError

MAX_DEPTH = 64  # parentheses within parentheses

# A class, an escape, or any other character.
_PIECE = re.compile(r"\[(?:\\.|[^\]\\])*\]?|\\.?|.", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED_LETTERS = "dDwWsSnrtfvxu0"
# In a JSON string these are written in more than one character, which the compiler does not do.
_NOT_IN_JSON = re.compile(r'"|\\["\\nrtfv0]|\\x|\\u00[0-7]|[\x00-\x1f]')


def check_regex(pattern: str, what: str, *, in_json: bool = False) -> None:
    """Refuse, with ConfigError, what the compiler would take in another sense.

    Args:
        what: names the pattern in the message.
        in_json: it is of the content of a JSON string.
    """
    depth = 0
    for piece in _PIECE.findall(pattern):
        depth += (piece == "(") - (piece == ")")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{what} nests parentheses more than {MAX_DEPTH} deep; simplify it")
        if piece.startswith(("[]", "[^]")):
            raise ConfigError(
                f"{what} has a class that begins with ']', which engines read in two ways; write '\\]'"
            )
        for letter in _ESCAPE.findall(piece):
            if letter.isalnum() and letter not in _ESCAPED_LETTERS:
                raise ConfigError(f"{what} uses '\\{letter}', which is not supported")
    if "\0" in pattern:
        raise ConfigError(f"{what} has a NUL character; remove it")
    if in_json and (found := _NOT_IN_JSON.search(pattern)):
        raise ConfigError(
            f"{what} names {found[0]!r}, which JSON strings must escape; that is not supported in a pattern"
        )


def without_newline_dots(pattern: str) -> str:
    """The same pattern for an engine whose dot matches newlines."""
    return "".join("[^\\n]" if piece == "." else piece for piece in _PIECE.findall(pattern))
