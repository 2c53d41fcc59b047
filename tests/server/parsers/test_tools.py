"""Tools and tool_choice: what is accepted, and in what words the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.server.parsers import NamedFunction, validate_tools
from tests.server.parsers.formats import tool

WEATHER = tool("get_weather", city="string")
TIME = {"type": "function", "name": "get_time"}  # in the shape of responses, and without parameters
FUNCTION = '{"type": "function", "function": {"name": ...}}'


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


def described(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("tools", "tool_choice", "expected"),
    [
        ([], None, "none"),
        (None, None, "none"),
        (None, "auto", "auto"),
        ([WEATHER], None, "auto"),
        ([WEATHER], "auto", "auto"),
        ([WEATHER, TIME], "none", "none"),
        ([WEATHER, TIME], "required", "required"),
        ([WEATHER], {"type": "function", "function": {"name": "get_weather"}}, NamedFunction("get_weather")),
        ([WEATHER, TIME], {"type": "function", "name": "get_time"}, NamedFunction("get_time")),
        (described(parameters={}), None, "auto"),
        (described(parameters={"$ref": "#/$defs/A", "$defs": {"A": {}}}), None, "auto"),
        (described(parameters=deep(99)), None, "auto"),
    ],
)
def test_sound_requests(tools: Any, tool_choice: object, expected: object) -> None:
    assert validate_tools(tools, tool_choice, can_parse_calls=True) == expected


REFUSED = {
    "unknown function": (
        [WEATHER, TIME],
        {"type": "function", "function": {"name": "get_wether"}},
        "tool_choice names the function 'get_wether'; did you mean 'get_weather'?; tools has get_weather, get_time",
    ),
    "function without tools": (
        [],
        {"type": "function", "function": {"name": "f"}},
        "tool_choice names the function 'f'; tools is empty",
    ),
    "required without tools": (
        [],
        "required",
        "tool_choice is 'required' but tools is empty; give the functions to choose from",
    ),
    "unknown choice": (
        [WEATHER],
        "require",
        "tool_choice is 'require'; did you mean 'required'?; it must be auto, none, required or " + FUNCTION,
    ),
    "choice of another shape": (
        [WEATHER],
        {"type": "function", "function": "f"},
        f"tool_choice must be auto, none, required or {FUNCTION}, got {{'type': 'function', 'function': 'f'}}",
    ),
    "choice of another kind": (
        [WEATHER],
        {"type": "web_search"},
        f"tool_choice must be auto, none, required or {FUNCTION}, got {{'type': 'web_search'}}",
    ),
    "choice that is a number": (
        [WEATHER],
        3,
        f"tool_choice must be auto, none, required or {FUNCTION}, got 3",
    ),
    "tools that are no list": ({"f": 1}, None, "tools must be a list, got {'f': 1}"),
    "tool that is no object": (["f"], None, "tools[0] must be an object, got 'f'"),
    "tool of another kind": (
        [WEATHER, {"type": "web_search"}],
        None,
        "tools[1].type is 'web_search'; only 'function' can be served",
    ),
    "function that is no object": (
        [{"type": "function", "function": "f"}],
        None,
        "tools[0].function must be an object, got 'f'",
    ),
    "no name": (
        [{"type": "function", "function": {}}],
        None,
        "tools[0].function.name is missing; give the function a name",
    ),
    "no name in the shape of responses": (
        [{"type": "function"}],
        None,
        "tools[0].name is missing; give the function a name",
    ),
    "name with a space": (
        [tool("get weather")],
        None,
        "tools[0].function.name must be 1 to 256 letters, digits, or _ . : / -, got 'get weather'",
    ),
    "name that is a number": (
        [tool(7)],  # type: ignore[arg-type]
        None,
        "tools[0].function.name must be 1 to 256 letters, digits, or _ . : / -, got 7",
    ),
    "two of one name": (
        [WEATHER, TIME, WEATHER],
        None,
        "tools[2] has the name 'get_weather' of tools[0]; rename one of them",
    ),
    "parameters that are a list": (
        described(parameters=[]),
        None,
        "tools[0].function.parameters must be a JSON schema of an object, got []",
    ),
    "parameters of another type": (
        described(parameters={"type": "array"}),
        None,
        "tools[0].function.parameters.type must be 'object', got 'array'",
    ),
    "properties that are a list": (
        described(parameters={"type": "object", "properties": ["a"]}),
        None,
        "tools[0].function.parameters.properties must be an object, got ['a']",
    ),
    "parameters nested deeply": (
        described(parameters=deep(100_000)),
        None,
        "tools[0].function.parameters is nested more than 100 deep; make the schema flatter",
    ),
    "long value": (
        ["x" * 1000],
        None,
        "tools[0] must be an object, got '" + "x" * 56 + "...",
    ),
}


@pytest.mark.parametrize(("tools", "tool_choice", "message"), [*REFUSED.values()], ids=[*REFUSED])
def test_refused_requests(tools: Any, tool_choice: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_tools(tools, tool_choice, can_parse_calls=True)
    assert str(error.value) == message


@pytest.mark.parametrize("tool_choice", [None, "auto"])
def test_a_free_choice_needs_a_parser(tool_choice: object) -> None:
    with pytest.raises(ConfigError) as error:
        validate_tools([WEATHER], tool_choice)
    assert str(error.value) == (
        "tool_choice 'auto' needs a server started with --enable-auto-tool-choice --tool-call-parser NAME "
        "(one of hermes, qwen3_coder, qwen3_xml); 'none', 'required' and one function work without"
    )


@pytest.mark.parametrize(
    "tool_choice", ["none", "required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_other_choices_need_no_parser(tool_choice: object) -> None:
    validate_tools([WEATHER], tool_choice)
