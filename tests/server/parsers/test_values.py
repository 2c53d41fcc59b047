"""Text of parameters into values of the types that the tool's schema gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_runtime.server.parsers.schema_types import parameter_types
from moe_runtime.server.parsers.values import ValueWriter


def convert(types: list[Any], text: str) -> str:
    """JSON of a value, which is the same whether its text comes whole or character by character."""
    outcomes = set()
    for pieces in ([text], text):
        written: list[str] = []
        writer = ValueWriter(types, written.append)
        for piece in pieces:
            writer.write(piece)
        writer.close()
        outcomes.add("".join(written))
    (outcome,) = outcomes
    return outcome


CONVERTED = [
    ("integer", "12", "12"),
    ("integer", " -0012\n", "-12"),
    ("integer", "+5", "5"),
    ("integer", "5.0", "5"),
    ("integer", "-0", "0"),
    ("integer", "9" * 5000, "9" * 5000),
    ("number", "12", "12"),
    ("number", "1.50", "1.50"),
    ("number", "-.5", "-0.5"),
    ("number", "5.", "5"),
    ("number", "1e-7", "1e-7"),
    ("number", "0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ("boolean", "true", "true"),
    ("boolean", "False", "false"),
    ("null", "null", "null"),
    ("null", "None", "null"),
    ("string", "null", '"null"'),
    ("string", "12", '"12"'),
    ("string", ' a"\n', '" a\\"\\n"'),
    ("object", '{"a": [1.0, {"b": null}]}', '{"a": [1.0, {"b": null}]}'),
    ("object", "{}", "{}"),
    ("object", "{'a': True, 'b': [None, \"it's\", 'x\"\\n\\'\\\\ \\x41']}", None),
    ("array", "[1, 2]", "[1, 2]"),
    ("array", "['a', False]", '["a", false]'),
]

STRINGS = [
    ("integer", ["", "x", "1.5", "1e3", "1_000", "--1", "٣", "0x10", "."]),
    ("number", ["", "x", ".", "1e", "nan", "Infinity", "1 2"]),
    ("boolean", ["", "yes", "1", "truely"]),
    ("null", ["", "nil"]),
    ("object", ["", "[1]", "{", "{'a': }", '{"a": NaN}', "{a: 1}", "{'a': f()}", '{"a": 1} x', "{'a"]),
    ("array", ["", "{}", "[1,", "[1]]", "1, 2", "[" * 100_000 + "]" * 100_000]),
]


@pytest.mark.parametrize(("kind", "text", "expected"), CONVERTED)
def test_a_value_of_its_type(kind: str, text: str, expected: str | None) -> None:
    got = convert([kind], text)
    if expected is None:
        assert json.loads(got) == {"a": True, "b": [None, "it's", "x\"\n'\\ A"]}
    else:
        assert got == expected


@pytest.mark.parametrize(("kind", "texts"), STRINGS)
def test_a_value_that_does_not_fit_stays_a_string(kind: str, texts: list[str]) -> None:
    for text in texts:
        assert json.loads(convert([kind], text)) == text


@pytest.mark.parametrize(
    ("types", "text", "expected"),
    [
        (["string", "null"], "null", None),
        (["null", "string"], "None", None),
        (["string", "null"], "nul", "nul"),
        (["string", "null"], "nullable", "nullable"),
        (["string", "null"], "", ""),
        (["integer", "null"], "null", None),
        (["integer", "null"], "3", 3),
        (["integer", "string"], "3", 3),
        (["integer", "string"], "three", "three"),
        (["string", "integer"], "3", "3"),
        (["array", "object"], '{"a": 1}', {"a": 1}),
        (["boolean", "number", "string"], "1.5", 1.5),
    ],
)
def test_of_several_types_the_first_that_fits(types: list[Any], text: str, expected: object) -> None:
    assert json.loads(convert(types, text)) == expected


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, ("integer",)),
        ({"type": ["string", "null"]}, ("string", "null")),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ("string", "null")),
        ({"oneOf": [{"type": "array"}, {"anyOf": [{"type": "null"}]}]}, ("array", "null")),
        ({"allOf": [{"$ref": "#/$defs/Colour"}]}, ("string",)),
        ({"$ref": "#/$defs/Point"}, ("object",)),
        ({"$ref": "#/$defs/a~1b"}, ("number",)),
        ({"$ref": "#/$defs/Loop"}, ("boolean",)),
        ({"$ref": "#/$defs/Missing"}, ("string",)),
        ({"$ref": "https://example.com/schema"}, ("string",)),
        ({"$ref": "#"}, ("object",)),
        ({"enum": [1, 2.5, "x", None, True, [], {}]}, None),
        ({"const": 3}, ("integer",)),
        ({"properties": {}}, ("object",)),
        ({"items": {}}, ("array",)),
        ({}, ("string",)),
        (True, ("string",)),
        ({"type": "varchar"}, ("string",)),
        ({"type": {"a": []}}, ("string",)),
        ({"anyOf": "x"}, ("string",)),
    ],
)
def test_types_that_a_schema_gives(schema: object, types: tuple[str, ...] | None) -> None:
    parameters = {
        "type": "object",
        "properties": {"p": schema},
        "$defs": {
            "Colour": {"enum": ["red", "blue"]},
            "Point": {"properties": {"x": {"type": "number"}}},
            "a/b": {"type": "number"},
            "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "boolean"}] * 1000},
        },
    }
    all_types = ("integer", "number", "string", "null", "boolean", "array", "object")
    assert parameter_types(parameters, "p") == (types or all_types)


def test_undeclared_parameters_have_the_type_of_additional_properties() -> None:
    assert parameter_types({"additionalProperties": {"type": "integer"}}, "p") == ("integer",)
    assert parameter_types({"additionalProperties": True}, "p") == ("string",)
    assert parameter_types({}, "p") == ("string",)
