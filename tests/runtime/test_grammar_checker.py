"""A driver's verdicts on grammars, hostile ones among them, from a process that it may kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.grammar import checker as checker_module
from moe_runtime.grammar.checker import GrammarChecker
from moe_runtime.grammar.library import readable
from moe_runtime.modelfiles import resolve_model
from moe_runtime.request import StructuredOutputsParams

LIMIT_S = 1.0


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(resolve_model(None), 4096, (2, 0), limit_s=LIMIT_S)
    yield made
    made.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"json": {"oneOf": [{"type": "integer"}, {"type": "null"}]}},
        {"json": {"$defs": {"t": {"properties": {"c": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"}},
        {"regex": r"(a+)+\_x"},
        {"choice": ["a", "é"]},
        {"grammar": 'root ::= "a" root | "b"'},
        {"json_object": True},
        {"json_object": True, "after": "</think>"},
        {"regex": "a*", "after": "</think>", "after_opening": "<think>"},
    ],
    ids=str,
)
def test_good_grammars_pass(checker: GrammarChecker, fields: dict[str, Any]) -> None:
    checker.check(StructuredOutputsParams(**fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"regex": "(a"},
            "regex is refused: Regex parsing error at position 3: The parenthesis is not closed",
        ),
        ({"regex": "a(?=b)"}, "regex is refused: .*Lookahead"),
        ({"regex": "a^b"}, "regex is refused, for it would not be enforced: .*should be at the start"),
        ({"regex": "a{2"}, "regex is refused"),
        (
            {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
            "json is refused, for it would not be enforced: .*oneOf",
        ),
        (
            {"json": {"type": "string", "pattern": "(?!a)b"}},
            "json is refused, for it would not be enforced: .*Lookahead",
        ),
        (
            {"json": {"type": "integer", "multipleOf": 3, "minimum": 1}},
            "json is refused, for it would not be enforced: .*multipleOf",
        ),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "json is refused"),
        ({"json": {"type": "integer", "minimum": 10**30}}, "json is refused"),
        ({"json": '{"const": "\\ud800"}'}, "json is refused"),
        ({"grammar": 'root ::= "a'}, "grammar is refused: EBNF lexer error at line 1"),
        ({"grammar": "root ::= other"}, 'grammar is refused: .*"other" is not defined'),
        ({"grammar": "root ::= root"}, "grammar is refused: no text begins as it asks"),
        (
            {"grammar": "root ::= root", "after": "</think>", "after_opening": "<think>"},
            "grammar is refused: no text begins as it asks",
        ),
    ],
    ids=str,
)
def test_what_the_compiler_refuses_or_would_not_enforce_is_refused(
    checker: GrammarChecker, fields: dict[str, Any], words: str
) -> None:
    params = StructuredOutputsParams(**fields)
    for _ in range(2):  # compiled, and remembered
        with pytest.raises(ConfigError, match=f"^structured_outputs.{words}"):
            checker.check(params)


def test_a_grammar_without_end_is_killed_and_the_next_one_is_answered(checker: GrammarChecker) -> None:
    every_pair = [f"r{i} r{j}" for i in range(10) for j in range(10)]
    rules = [f'r{i} ::= {" | ".join(every_pair)} | [a-z] | ""' for i in range(10)]
    endless = StructuredOutputsParams(grammar="\n".join(["root ::= r0", *rules]))
    with pytest.raises(
        ConfigError, match=r"structured_outputs.grammar takes more than 1 s to compile; simplify it"
    ):
        checker.check(endless)
    checker.check(StructuredOutputsParams(regex="after"))


def test_without_xgrammar_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'moe-runtime\[structured\]'"):
        GrammarChecker(resolve_model(None), 4096, (2,)).check(StructuredOutputsParams(regex="a"))


def test_messages_of_the_library_lose_their_origin() -> None:
    assert readable("[12:34:56] /project/cpp/a.cc:83: Wrong.\nat 3") == "Wrong."
    assert readable("") == "no reason given"
    assert len(readable(json.dumps("x" * 1000))) == 300
