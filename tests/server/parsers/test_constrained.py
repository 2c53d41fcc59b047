"""Calls that structured output enforced: tool_choice "required", or one function by name."""

from __future__ import annotations

import pytest

from moe_runtime.server.parsers import OutputParser, make_output_parser
from tests.server.parsers.formats import Answer, parse_all_ways, tool

TOOLS = [tool("f", a="string"), tool("g")]
NAMED = {"type": "function", "function": {"name": "f"}}


def make(tool_choice: object, parallel_tool_calls: bool = True, reasoning: str | None = None) -> OutputParser:
    return make_output_parser(
        tool_call_parser=None,
        reasoning_parser=reasoning,
        tools=TOOLS,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('[{"name": "g", "parameters": {}}]', Answer("", (("g", "{}"),))),
        (
            ' [ {"name" : "f", "parameters" : {"a": "]}, \\" {"} } ,\n {"name":"g","parameters":{}} ] \n',
            Answer("", (("f", '{"a": "]}, \\" {"}'), ("g", "{}"))),
        ),
        ('[{"name": "f", "parameters": {"a": "</tool_call>', Answer("", (("f", '{"a": "</tool_call>'),))),
        ('[{"name": "f", "parameters": {"a": 1}}, {"na', Answer('{"na', (("f", '{"a": 1}'),))),
        ("[", Answer()),
        ("", Answer()),
        ("\n Sorry, no.", Answer("\n Sorry, no.")),
        ('[{"name": "g", "parameters": {}}] and so on', Answer("and so on", (("g", "{}"),))),
        ("[1, 2]", Answer("1, 2]")),
        ('[{"name": "g", "parameters": {}}, oops]', Answer("oops]", (("g", "{}"),))),
    ],
)
def test_required(text: str, answer: Answer) -> None:
    assert parse_all_ways(lambda: make("required"), text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"a": "x"}', Answer("", (("f", '{"a": "x"}'),))),
        (' {"a": {"b": [1]}}\n', Answer("", (("f", '{"a": {"b": [1]}}'),))),
        ('{"a": "<tool_call>', Answer("", (("f", '{"a": "<tool_call>'),))),
        ("", Answer()),
        (" no", Answer(" no")),
        ("{} x", Answer("x", (("f", "{}"),))),
    ],
)
def test_named(text: str, answer: Answer) -> None:
    assert parse_all_ways(lambda: make(NAMED), text) == answer
    assert parse_all_ways(lambda: make({"type": "function", "name": "f"}), text) == answer


def test_calls_after_the_first_are_dropped_without_parallel_tool_calls() -> None:
    text = '[{"name": "g", "parameters": {}}, {"name": "f", "parameters": {}}]'
    assert parse_all_ways(lambda: make("required", False), text) == Answer("", (("g", "{}"),))


def test_reasoning_comes_first() -> None:
    answer = parse_all_ways(lambda: make(NAMED, reasoning="qwen3"), '<think>\nHm.\n</think>\n\n{"a": 1}')
    assert answer == Answer("", (("f", '{"a": 1}'),), "Hm.")


def test_arguments_stream() -> None:
    parser = make(NAMED)

    (begun,) = parser.feed("{").tool_calls
    assert (begun.name, begun.arguments) == ("f", "{")
    assert [c.arguments for c in parser.feed('"a": "b').tool_calls] == ['"a": "b']
    assert [c.arguments for c in parser.feed('c"}').tool_calls] == ['c"}']
