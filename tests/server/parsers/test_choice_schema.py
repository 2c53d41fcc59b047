"""The schema that makes a model call a function."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from moe_runtime.server.parsers import tool_choice_schema
from tests.server.parsers.formats import tool

F = tool("f", a="string")
G = {"type": "function", "function": {"name": "g"}}
# A tree, by a reference to the root, and a definition: each function has its own meaning of "Leaf".
TREE = {
    "type": "function",
    "function": {
        "name": "tree",
        "parameters": {
            "type": "object",
            "properties": {
                "left": {"$ref": "#"},
                "leaf": {"$ref": "#/$defs/Leaf"},
                "$ref": {"const": {"$ref": "#"}},
            },
            "additionalProperties": False,
            "$defs": {"Leaf": {"type": "integer"}},
        },
    },
}
WORDS = {
    "type": "function",
    "function": {
        "name": "a/b",
        "parameters": {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/definitions/Leaf"}},
            "definitions": {"Leaf": {"type": "string"}},
        },
    },
}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def is_valid(schema: dict[str, Any] | None, value: object) -> bool:
    assert schema is not None
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("tool_choice", [None, "auto", "none"])
def test_a_free_choice_has_no_schema(tool_choice: object) -> None:
    assert tool_choice_schema([F], tool_choice) is None


def test_a_named_function_has_the_schema_of_its_parameters() -> None:
    assert tool_choice_schema([F, G], named("f")) == F["function"]["parameters"]
    assert tool_choice_schema([F, G], named("g")) == {"type": "object", "properties": {}}
    assert tool_choice_schema([TREE], named("tree")) == TREE["function"]["parameters"]


def test_parameters_are_an_object_even_where_the_schema_does_not_say_so() -> None:
    schema = tool_choice_schema([{"type": "function", "name": "f", "parameters": {}}], named("f"))
    assert schema == {"type": "object"}


def test_required_is_an_array_of_calls() -> None:
    call = {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": ["f"]}, "parameters": F["function"]["parameters"]},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    assert tool_choice_schema([F], "required") == {"type": "array", "minItems": 1, "items": {"anyOf": [call]}}


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([{"name": "f", "parameters": {"a": "x"}}], True),
        ([{"name": "f", "parameters": {"a": "x"}}, {"name": "g", "parameters": {}}], True),
        ([], False),
        ([{"name": "f", "parameters": {"a": 1}}], False),
        ([{"name": "h", "parameters": {}}], False),
        ([{"name": "f"}], False),
        ([{"name": "tree", "parameters": {"left": {"left": {"leaf": 3}}}}], True),
        ([{"name": "tree", "parameters": {"left": {"left": {"leaf": "x"}}}}], False),
        ([{"name": "tree", "parameters": {"left": {"right": {}}}}], False),
        ([{"name": "tree", "parameters": {"$ref": {"$ref": "#"}}}], True),
        ([{"name": "a/b", "parameters": {"leaf": "x"}}], True),
        ([{"name": "a/b", "parameters": {"leaf": 3}}], False),
    ],
)
def test_what_the_schema_of_required_allows(calls: list[Any], expected: bool) -> None:
    assert is_valid(tool_choice_schema([F, G, TREE, WORDS], "required"), calls) is expected


def test_without_parallel_calls_there_is_just_one() -> None:
    schema = tool_choice_schema([G], "required", parallel_tool_calls=False)
    call = {"name": "g", "parameters": {}}

    assert is_valid(schema, [call])
    assert not is_valid(schema, [call, call])
