"""What the grammars of JSON schemas let through, held against jsonschema, and what is refused by name."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.request import EngineRequest, SamplingParams, StructuredOutputsParams
from tests.runtime.structured_rank import EOS, VOCAB, compiled, demo_tokenizer

INTEGER, STRING = {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 3}

ENFORCED: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": INTEGER, "b": STRING, "c": {"type": "null"}}, "required": ["b"]},
    {"properties": {"a": INTEGER}, "required": ["a"]},
    {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": STRING, "maxProperties": 3},
    {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER}, "unevaluatedProperties": INTEGER, "maxProperties": 3},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}, "minProperties": 2},
    {"type": "object", "patternProperties": {"^x[ab]$": INTEGER}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "propertyNames": {"pattern": "^x[a-z]{0,2}$"}, "maxProperties": 2},
    {
        "type": "object",
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": INTEGER,
        "maxProperties": 2,
    },
    {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4},
    {"items": INTEGER, "maxItems": 3},
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 1},
    {"type": "array", "prefixItems": [INTEGER], "items": {"type": "boolean"}, "maxItems": 3},
    {"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False},
    {"type": "array", "items": INTEGER, "maxItems": 2, "uniqueItems": False},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    {"type": "string", "pattern": "^(a|[^a-z]b?)$"},
    {"type": "string", "format": "uuid"},
    {
        "type": "object",
        "propertyNames": {"minLength": 1, "maxLength": 2},
        "minProperties": 1,
        "maxProperties": 1,
    },
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    {"type": "integer", "exclusiveMinimum": 99, "minimum": 5, "maximum": 1234},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "minimum": 0.1, "maximum": 2.5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"enum": [1, "a", None, {"b": [True, 1.5]}]},
    {"enum": ["a", "b"], "type": "string"},
    {"const": 'a "b"\\\n', "type": "string"},
    {"const": "x", "enum": ["x"], "title": "a tag"},
    {"type": ["string", "null", "integer"], "maxLength": 2, "minimum": 3, "maximum": 40},
    {"anyOf": [INTEGER, {"type": "null"}], "description": "perhaps", "default": None},
    {"oneOf": [INTEGER, {"type": "boolean"}]},
    {"allOf": [INTEGER]},
    {"$ref": "#/$defs/a", "$defs": {"a": INTEGER}},
    {"properties": {"x": {"$ref": "#/properties/y"}, "y": INTEGER}, "required": ["x"]},
    {"$defs": {"t": {"anyOf": [INTEGER, {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}]}}}
    | {"$ref": "#/$defs/t"},
]


def _matcher(structured: StructuredOutputsParams, output: list[int]) -> TokenMatcher:
    request = EngineRequest(
        request_id="walk",
        sample_index=0,
        prompt_token_ids=(1,),
        params=SamplingParams(structured_outputs=structured),
        seed=0,
        eos_token_ids=EOS,
    )
    return TokenMatcher(compiled(structured), request, output)


def _allowed(matcher: TokenMatcher) -> list[int]:
    words = np.zeros(VOCAB // 32, dtype=np.int32)
    matcher.fill(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def _follows(structured: StructuredOutputsParams, tokens: list[int]) -> bool:
    """Whether the grammar lets these tokens through, one after another, and then an end."""
    output: list[int] = []
    matcher = _matcher(structured, output)
    for token in [*tokens, EOS[0]]:
        if token not in _allowed(matcher):
            return False
        output.append(token)
    return True


def _walk(structured: StructuredOutputsParams, seed: int) -> str:
    """A text that the grammar lets through, drawn token by token; ends where it may, most of the time."""
    draw = random.Random(seed)
    output: list[int] = []
    matcher = _matcher(structured, output)
    closers = {demo_tokenizer().token_to_id(char) for char in '"]}'} | set(EOS)
    while True:
        allowed = _allowed(matcher)
        closing = [token for token in allowed if token in closers]
        token = draw.choice(closing if closing and draw.random() < 0.3 + len(output) / 100 else allowed)
        if token in EOS:
            return demo_tokenizer().decode(output)
        output.append(token)


@pytest.mark.parametrize("schema", ENFORCED, ids=json.dumps)
def test_every_text_that_the_grammar_lets_through_is_valid(schema: dict[str, Any]) -> None:
    structured = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    for seed in range(12):
        jsonschema.Draft202012Validator(schema).validate(json.loads(_walk(structured, seed)))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("date", r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"),  # of the calendar's days the form alone
        ("time", r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"),
        ("date-time", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"),
        ("duration", r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?!$)(\d+H)?(\d+M)?(\d+S)?)?)"),
        ("uuid", r"[\da-fA-F]{8}(-[\da-fA-F]{4}){3}-[\da-fA-F]{12}"),
        ("ipv4", r"((25[0-5]|2[0-4]\d|[01]?\d?\d)(\.(?=\d)|$)){4}"),
        ("hostname", r"[A-Za-z\d]([A-Za-z\d-]*[A-Za-z\d])?(\.[A-Za-z\d]([A-Za-z\d-]*[A-Za-z\d])?)*"),
    ],
)
def test_formats_are_enforced(name: str, form: str) -> None:
    structured = StructuredOutputsParams(json={"type": "string", "format": name})
    for seed in range(12):
        text = json.loads(_walk(structured, seed))
        assert re.fullmatch(form, text, re.ASCII), text


@pytest.mark.parametrize(
    "limits",
    [{"minLength": 1}, {"maxLength": 1}, {"minLength": 1, "maxLength": 1}, {"minLength": 1, "maxLength": 40}],
    ids=str,
)
def test_a_string_of_limited_length_has_no_control_characters_but_escapes(limits: dict[str, int]) -> None:
    name = {"type": "object", "properties": {"a": {"type": "string", **limits}}, "required": ["a"]}
    structured = StructuredOutputsParams(json=name, disable_any_whitespace=True)
    for char, allowed in (
        ("a", True),
        ("é", True),
        ("\\n", True),
        ("\n", False),
        ("\x01", False),
        ("\\x", False),
    ):
        text = demo_tokenizer().encode(f'{{"a": "{char}"}}', add_special_tokens=False)
        assert _follows(structured, text) == allowed, repr(char)


def test_a_constant_that_looks_like_a_piece_of_grammar_stays() -> None:
    constant = '[^\\"\\\\\\r\\n]'
    structured = StructuredOutputsParams(json={"enum": [constant]})
    assert json.loads(_walk(structured, 0)) == constant


def test_white_space_is_free_unless_it_is_disabled() -> None:
    texts = [_walk(StructuredOutputsParams(json=ENFORCED[0]), seed) for seed in range(12)]
    assert any("\n" in text for text in texts)
    assert all(isinstance(json.loads(text), dict) for text in texts)


# Schemas that the compiler would take and not enforce to the letter, and the words that name why not.
REFUSED: list[tuple[Any, str]] = [
    (["a"], "must be a JSON object"),
    ({"type": "array", "uniqueItems": True}, "at /: uniqueItems is not supported for type array"),
    ({"type": "array", "contains": INTEGER}, "contains is not supported"),
    ({"type": "object", "required": ["b"]}, "at /required: 'b' is not declared; put it into properties"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired is not supported"),
    (
        {"type": "object", "patternProperties": {"^a": INTEGER}, "properties": {}},
        "properties beside patternProp",
    ),
    ({"type": "object", "patternProperties": {"^a": {}, "b": {}}}, "one pattern is supported, got 2"),
    ({"type": "object", "propertyNames": STRING, "properties": {"a": {}}}, "properties beside propertyNames"),
    ({"type": "object", "additionalProperties": {}, "minProperties": 2}, "minProperties above 1"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "maxLength beside pattern is not supported"),
    ({"type": "string", "format": "date", "pattern": "a"}, "format beside pattern"),
    ({"type": "string", "format": "idn-email"}, "format 'idn-email' is not supported"),
    ({"type": "string", "pattern": '^"$'}, "JSON strings must escape"),
    ({"type": "string", "pattern": "\\\\"}, "JSON strings must escape"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding is not supported"),
    ({"type": "number", "multipleOf": 0.5}, "multipleOf is not supported for type number"),
    ({"enum": [1, "a"], "type": "string"}, "value 1 is not of type string"),
    ({"enum": []}, "must be a list that is not empty"),
    ({"const": 1, "minimum": 3}, "minimum beside const"),
    ({"anyOf": [INTEGER], "type": "string"}, "type beside anyOf is not supported, it would be ignored"),
    ({"allOf": [INTEGER, STRING]}, "at /allOf: allOf of several schemas"),
    ({"$ref": "#/$defs/a", "$defs": {"a": INTEGER}, "minimum": 5}, "minimum beside $ref"),
    ({"$ref": "https://example.org/a"}, "must lead to a place in the same schema"),
    ({"$ref": "#/$defs/a"}, "leads nowhere"),
    ({"not": STRING}, "not without a type is not supported"),
    ({"if": INTEGER, "then": {}}, "if without a type is not supported"),
    ({"minLength": 3}, "minLength without a type is not supported; give a type"),
    (
        {"type": "string", "maxLenght": 3},
        "maxLenght is not supported for type string; did you mean 'maxLength'?",
    ),
    ({"type": "strin"}, "at /type: must be of object, array"),
    ({"type": []}, "at /type: must be of object, array"),
    ({"type": "string", "minLength": -1}, "must be a whole number from 0"),
    ({"properties": {"a": {"$defs": {"b": {"not": {}}}}}}, "at /properties/a/$defs/b: not without a type"),
    ({"properties": {"a": {"$id": "x", "type": "null"}}}, "$id is not supported"),
    ({"properties": [1]}, "must be an object of schemas"),
    ({"properties": {"a": 3}}, "at /properties/a: a schema must be an object or a boolean, got 3"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSED, ids=lambda value: json.dumps(value)[:80])
def test_what_would_not_be_enforced_is_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        StructuredOutputsParams(json=json.dumps(schema))
    assert str(refused.value).startswith("structured_outputs.json")
    assert words in str(refused.value)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (json.dumps(_nested(70)), "schemas are nested more than 64 deep"),
        ('{"items":' * 100_000 + "{}" + "}" * 100_000, "has 1000002 bytes, at most 131072 are taken"),
        ('{"items":' * 12_000 + "{}" + "}" * 12_000, "nested too deeply"),
        (_nested(2000), "nested"),
        ('{"type": ', "is no JSON"),
        ('{"const": NaN}', "NaN is not a JSON number"),
        ({"const": float("nan")}, "is no JSON"),
        ({"const": {1, 2}}, "is no JSON"),
        (7, "must be a JSON schema, as a dict or a string, got 7"),
    ],
    ids=["deep", "long", "too deep to parse", "too deep to write", "cut off", "NaN", "nan", "set", "7"],
)
def test_hostile_schemas_are_refused(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        StructuredOutputsParams(json=schema)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 400
