"""StructuredOutputsParams: one form, checked when it is made, the same after its way to a rank."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_runtime import SamplingParams, StructuredOutputsParams
from moe_runtime.errors import ConfigError
from moe_runtime.grammar.compiler import choice_grammar
from moe_runtime.request import EngineRequest, stop_ids
from moe_runtime.structured_outputs.regex import without_newline_dots
from moe_runtime.transport import wire

GOOD: list[dict[str, Any]] = [
    {"json": {"type": "object", "properties": {"a": {"type": "null"}}}},
    {"json": '{"type": "integer"}', "disable_any_whitespace": True},
    {"regex": r"[\d\]-]+(?:a|b){2,3}\.?"},
    {"choice": ["a", "b"]},
    {"grammar": 'root ::= "a" | "Token(" x # ((((\nx ::= [(]'},
    {"json_object": True},
    {"json_object": False, "regex": "a"},
    {"regex": "a", "after": "</think>"},
    {"regex": "a", "after": "</think>", "after_opening": "<think>"},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_the_same_params_arrive_at_a_rank(fields: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
    request = EngineRequest(
        request_id="a", sample_index=0, prompt_token_ids=(1,), params=params, seed=1, eos_token_ids=(2,)
    )
    sent = wire.decode_to_rank(wire.encode(wire.Submit.of([request])))
    assert isinstance(sent, wire.Submit)
    (arrived,) = sent.engine_requests()
    assert arrived == request
    assert hash(arrived.params.structured_outputs) == hash(params.structured_outputs)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "needs exactly one of json, regex, choice, grammar, json_object, got none"),
    ({"regex": "a", "choice": ["a"]}, "needs exactly one of .*, got regex, choice"),
    ({"json_object": False}, "got none"),
    ({"json_object": "yes"}, "json_object must be True or False, got 'yes'"),
    ({"regex": "a", "after": ""}, "after must be 1 to 64 printable ASCII characters, got ''"),
    ({"regex": "a", "after": "x" * 65}, "after must be 1 to 64 printable ASCII characters"),
    ({"regex": "a", "after": "\n"}, r"after must be 1 to 64 printable ASCII characters, got '\\n'"),
    ({"regex": "a", "after": "é"}, "after must be 1 to 64 printable ASCII characters"),
    ({"regex": "a", "after": 3}, "after must be .*, got 3"),
    ({"regex": "a", "after": "b", "after_opening": ""}, "after_opening must be 1 to 64"),
    ({"regex": "a", "after_opening": "<think>"}, "after_opening is '<think>' but after is not given"),
    ({"regx": "a"}, "no argument 'regx'; did you mean 'regex'?"),
    ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace must be True or False, got 1"),
    ({"regex": ""}, "regex must be a string that is not empty"),
    ({"regex": 3}, "regex must be a string that is not empty, got 3"),
    ({"regex": "a" * 20_000}, "regex has 20000 bytes, at most 16384 are taken"),
    ({"regex": "(" * 65 + "a" + ")" * 65}, "nests parentheses more than 64 deep"),
    ({"regex": r"\bfoo"}, r"uses '\\b', which is not supported"),
    ({"regex": r"a\Z"}, r"uses '\\Z', which is not supported"),
    ({"regex": r"(a)\1"}, r"uses '\\1', which is not supported"),
    ({"regex": "[]a]"}, "a class that begins with ']'"),
    ({"regex": "a\0"}, "NUL"),
    ({"regex": "\ud800"}, "holds what is no character"),
    ({"choice": []}, "choice must be a list of strings, got \\[\\]"),
    ({"choice": "abc"}, "choice must be a list of strings, got 'abc'"),
    ({"choice": ["a", ""]}, "strings that are not empty, got '' at index 1"),
    ({"choice": ["a", 3]}, "strings that are not empty, got 3 at index 1"),
    ({"choice": ["a"] * 10_001}, "has 10001 choices, at most 10000 are taken"),
    ({"choice": ["a" * 200_000]}, "choice has 200000 bytes, at most 131072"),
    ({"grammar": ""}, "grammar must be a string that is not empty"),
    ({"grammar": "root ::= " + "(" * 65 + '"a"' + ")" * 65}, "nests parentheses more than 64 deep"),
    ({"grammar": 'root ::= "a" Token(7)'}, r"uses Token\(\.\.\.\), which is not supported"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_form_is_refused_with_its_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        StructuredOutputsParams(**fields)
    assert len(str(refused.value)) < 300


def test_sampling_params_take_nothing_else() -> None:
    with pytest.raises(ConfigError, match="structured_outputs must be StructuredOutputsParams or None"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_end_of_text_ends_a_structured_text_even_where_it_is_ignored() -> None:
    structured = StructuredOutputsParams(regex="a")
    assert stop_ids(SamplingParams(ignore_eos=True), (2,)) == set()
    assert stop_ids(SamplingParams(ignore_eos=True, structured_outputs=structured), (2,)) == {2}


@pytest.mark.parametrize(
    ("pattern", "same"),
    [(".", r"[^\n]"), (r"a\..[.].", r"a\.[^\n][.][^\n]"), (r"[^\]].", r"[^\]][^\n]"), (r"\\.", r"\\[^\n]")],
)
def test_a_dot_matches_no_newline(pattern: str, same: str) -> None:
    assert without_newline_dots(pattern) == same
    for text in ("a", "\n", "a.b.c", "a..\\", "\\x", "]\n", "ab"):
        assert bool(re.fullmatch(pattern, text)) == bool(re.fullmatch(same, text, re.DOTALL))


def test_equal_choices_are_one() -> None:
    assert choice_grammar(["b", "a", "b"]) == 'root ::= "b" | "a"'
