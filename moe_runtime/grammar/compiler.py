"""GrammarCompiler: StructuredOutputsParams to a grammar that is ready to be matched against one vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.grammar.library import load_xgrammar, readable
from moe_runtime.grammar.vocabulary import vocabulary_bytes
from moe_runtime.structured_outputs import StructuredOutputsParams
from moe_runtime.structured_outputs.regex import without_newline_dots
from moe_runtime.tokenizer import Tokenizer

_ANY_OBJECT = '{"type": "object"}'
MAX_BREAKS = 2  # line breaks between the end of the reasoning and the form

# A character of a string that has minLength or maxLength: xgrammar 0.2.8 lets control characters through, which
# JSON does not, and no escape. Nothing else makes this class: patterns cannot name quotes.
_LOOSE_CHARACTER = r"[^\"\\\r\n]"
_STRICT_CHARACTER = r'([^\0-\x1f\"\\] | "\\" [\"\\/bfnrt])'
_LITERAL_OR_CLASS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')


class GrammarCompiler:
    """Compiles for one tokenizer, on the calling thread. Compiled grammars are shared and never change."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        """
        Args:
            vocab_size: the model's, to which the tokenizer's is filled up.
            end_ids: tokens that end a text; a matcher may name others.

        Raises:
            ConfigError: xgrammar is missing, or the vocabulary is of an unknown kind.
        """
        xgrammar = load_xgrammar()
        info = xgrammar.TokenizerInfo(
            vocabulary_bytes(tokenizer, vocab_size),
            xgrammar.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=[token for token in end_ids if token < vocab_size],
        )
        self._grammar_class = xgrammar.Grammar
        # Whoever calls decides about threads and caching.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, params: StructuredOutputsParams) -> Any:
        """An xgrammar.CompiledGrammar; ConfigError with the library's reason for what it refuses."""
        try:
            return self._compiler.compile_grammar(self._after_reasoning(self._form(params), params))
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            reason = readable(str(error) or type(error).__name__)
            raise ConfigError(f"structured_outputs.{params.kind} is refused: {reason}") from error

    def _form(self, params: StructuredOutputsParams) -> Any:
        of = self._grammar_class
        if params.regex is not None:
            return of.from_regex(without_newline_dots(params.regex))
        if params.choice is not None:
            return of.from_ebnf(choice_grammar(params.choice))
        if params.grammar is not None:
            return of.from_ebnf(params.grammar)
        return self._json_grammar(params)

    def _after_reasoning(self, form: Any, params: StructuredOutputsParams) -> Any:
        if params.after is None:
            return form
        of, opening = self._grammar_class, params.after_opening
        reasoned = of.concat(of.from_ebnf(reasoning_grammar(params.after, opening or "")), form)
        return reasoned if opening is None else of.union(reasoned, form)

    def _json_grammar(self, params: StructuredOutputsParams) -> Any:
        schema = str(params.json) if params.json is not None else _ANY_OBJECT
        grammar = self._grammar_class.from_json_schema(
            schema, any_whitespace=not params.disable_any_whitespace
        )
        ebnf = str(grammar)
        strict = _LITERAL_OR_CLASS.sub(_strict_character, ebnf)
        return grammar if strict == ebnf else self._grammar_class.from_ebnf(strict)


def _strict_character(piece: re.Match[str]) -> str:
    return _STRICT_CHARACTER if piece[0] == _LOOSE_CHARACTER else piece[0]


def choice_grammar(choices: Sequence[str]) -> str:
    """EBNF of one of several texts."""
    return "root ::= " + " | ".join(f'"{_escaped(choice)}"' for choice in dict.fromkeys(choices))


def reasoning_grammar(closing: str, opening: str = "") -> str:
    """EBNF of any text between two tags, with what may stand between it and the form."""
    close = _escaped(closing)
    breaks = " ".join(['"\\n"?'] * MAX_BREAKS)
    return (
        f'root ::= "{_escaped(opening)}" free "{close}" {breaks}\n'
        f'free ::= TagDispatch(loop_after_dispatch=false, excludes=("{close}"))'
    )


def _escaped(text: str) -> str:
    return "".join(
        f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}"
        for char in text
    )
