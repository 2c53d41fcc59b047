"""Random calls written as Qwen's templates write them come back equal, and random text comes back unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.server.parsers import make_output_parser
from tests.server.parsers.formats import Answer, MakeParser, coder_call, hermes_call, parse, tool

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,15}", fullmatch=True)
# What may be sent: half a surrogate pair may not.
CHARACTERS = st.characters(codec="utf-8")
TEXT = st.text(CHARACTERS | st.sampled_from('<>{}[]"\\/\n\t, :'), max_size=30)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
# Bits of the formats, to come upon every state of the parsers.
_BITS = r"""<tool_call> </tool_call> <function=f> <function= </function> <parameter=a> <parameter= </parameter>
<think> </think> {"name": "arguments": "f" {"a": " } ] [ { , : x 12 null True < > </ \ \u"""
MARKUP = st.lists(st.sampled_from([*_BITS.split(), "\n", "\n\n", " ", "\x01"]), max_size=25).map("".join)
PARSERS = ["hermes", "qwen3_coder"]
PARAMETERS = {"string": TEXT, "integer": st.integers(), "number": NUMBERS, "boolean": st.booleans()}


def cut(text: str, places: list[int]) -> list[str]:
    """`text` in pieces."""
    cuts = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


PLACES = st.lists(st.integers(0, 10_000), max_size=12)


def maker(tool_call_parser: str, tools: list[dict[str, Any]], **more: Any) -> MakeParser:
    return lambda: make_output_parser(
        tool_call_parser=tool_call_parser, reasoning_parser="qwen3", tools=tools, **more
    )


@given(
    calls=st.lists(st.tuples(NAMES, st.dictionaries(TEXT, JSON, max_size=4)), min_size=1, max_size=3),
    at=PLACES,
)
@settings(max_examples=60, deadline=None)
def test_hermes_calls_come_back(calls: list[tuple[str, dict[str, Any]]], at: list[int]) -> None:
    text = "\n".join(hermes_call(name, arguments) for name, arguments in calls)
    answer = parse(maker("hermes", [tool("f")])(), *cut(text, at))

    assert answer.content == ""
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == calls


@st.composite
def coder_arguments(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a function's parameters and values for them."""
    types = draw(st.dictionaries(NAMES, st.sampled_from([*PARAMETERS, "object", "array"]), max_size=4))
    containers = {
        "object": st.dictionaries(TEXT, JSON, max_size=3),
        "array": st.lists(JSON, max_size=3),
    }
    return types, {name: draw({**PARAMETERS, **containers}[kind]) for name, kind in types.items()}


@given(calls=st.lists(coder_arguments(), min_size=1, max_size=3), at=PLACES)
@settings(max_examples=60, deadline=None)
def test_qwen3_coder_calls_come_back(
    calls: list[tuple[dict[str, str], dict[str, Any]]], at: list[int]
) -> None:
    tools = [tool(f"f{i}", **types) for i, (types, _) in enumerate(calls)]
    text = "\n".join(coder_call(f"f{i}", arguments) for i, (_, arguments) in enumerate(calls))
    answer = parse(maker("qwen3_coder", tools)(), *cut(text, at))

    assert answer.content == ""
    assert [name for name, _ in answer.calls] == [f"f{i}" for i in range(len(calls))]
    assert [json.loads(arguments) for _, arguments in answer.calls] == [arguments for _, arguments in calls]


@given(value=st.dictionaries(TEXT, JSON, max_size=3))
@settings(max_examples=60, deadline=None)
def test_objects_that_a_template_printed_as_python_come_back(value: dict[str, Any]) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter=o>\n{value}\n</parameter>\n</function>\n</tool_call>"
    answer = parse(maker("qwen3_coder", [tool("f", o="object")])(), text)

    assert [json.loads(arguments) for _, arguments in answer.calls] == [{"o": value}]


@pytest.mark.parametrize("tool_call_parser", PARSERS)
@given(text=TEXT, at=PLACES)
@settings(max_examples=60, deadline=None)
def test_text_without_tags_comes_out_unchanged(tool_call_parser: str, text: str, at: list[int]) -> None:
    assert parse(maker(tool_call_parser, [tool("f")])(), *cut(text, at)) == Answer(text)


@pytest.mark.parametrize("tool_choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("tool_call_parser", PARSERS)
@given(text=MARKUP, at=PLACES)
@settings(max_examples=60, deadline=None)
def test_any_text_means_the_same_however_it_is_split(
    tool_call_parser: str, tool_choice: object, text: str, at: list[int]
) -> None:
    make = maker(tool_call_parser, [tool("f", a="string", b="object")], tool_choice=tool_choice)
    whole = parse(make(), text)

    assert parse(make(), *cut(text, at)) == whole
    assert parse(make(), *text) == whole


@pytest.mark.parametrize("tool_call_parser", PARSERS)
@given(text=MARKUP)
@settings(max_examples=60, deadline=None)
def test_no_text_is_lost_where_there_is_no_call(tool_call_parser: str, text: str) -> None:
    answer = parse(
        make_output_parser(tool_call_parser=tool_call_parser, reasoning_parser=None, tools=[tool("f")]), text
    )
    assert answer.calls or answer.content == text
