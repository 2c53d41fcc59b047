"""Checks of a grammar's text that the grammar compiler does not make."""

from __future__ import annotations

import re

from moe_runtime.errors import ConfigError

MAX_DEPTH = 64  # parentheses within parentheses

_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]|#[^\n]*')
# The compiler's own macros speak of tokens, which no grammar of text can mean.
_MACRO = re.compile(r"\b(Token|ExcludeToken|TagDispatch|TokenTagDispatch)\s*\(")


def check_ebnf(grammar: str) -> None:
    """Refuse, with ConfigError, what would be costly or no grammar of text."""
    bare = _QUOTED.sub(" ", grammar)
    if found := _MACRO.search(bare):
        raise ConfigError(
            f"structured_outputs.grammar uses {found[1]}(...), which is not supported; write literals and rules"
        )
    depth = 0
    for char in bare:
        depth += (char == "(") - (char == ")")
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"structured_outputs.grammar nests parentheses more than {MAX_DEPTH} deep; name inner parts as rules"
            )
