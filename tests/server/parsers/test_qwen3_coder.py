"""Qwen3-Coder's format: a function and its parameters as tags, with values as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_runtime.server.parsers import OutputParser, make_output_parser
from tests.server.parsers.formats import Answer, coder_call, parse, parse_all_ways, tool

TOOLS = [
    tool("f", a="string", b="string", n="integer", o="object", s={"type": ["string", "null"]}),
    tool("g"),
]


def make(name: str = "qwen3_coder", parallel_tool_calls: bool = True) -> OutputParser:
    return make_output_parser(
        tool_call_parser=name, reasoning_parser=None, tools=TOOLS, parallel_tool_calls=parallel_tool_calls
    )


def one(arguments: dict[str, Any], name: str = "f") -> Answer:
    return Answer("", ((name, json.dumps(arguments, ensure_ascii=False)),))


def parameter(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


F = coder_call("f", {"a": "x", "n": 12})
F_ANSWER = one({"a": "x", "n": 12})
G = coder_call("g", {})
BARE = F.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
BODY = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"

CALLS = {
    "one call": (F, F_ANSWER),
    "no parameters": (G, Answer("", (("g", "{}"),))),
    "text around": ("Look:\n" + F + "\nDone.", Answer("Look:\nDone.", F_ANSWER.calls)),
    "two calls": (F + "\n" + G, Answer("", (*F_ANSWER.calls, ("g", "{}")))),
    "no line breaks": (
        "<tool_call><function=f><parameter=a>x</parameter><parameter=n>12</parameter></function></tool_call>",
        F_ANSWER,
    ),
    "several lines": (BODY.format(parameter("a", "\n  x\n\ny\n")), one({"a": "\n  x\n\ny\n"})),
    "empty string": (BODY.format(parameter("a", "")), one({"a": ""})),
    "nothing at all": (BODY.format("<parameter=a></parameter>"), one({"a": ""})),
    "escapes": (BODY.format(parameter("a", '"\\n"\t\x01é😀')), one({"a": '"\\n"\t\x01é😀'})),
    "tags in a value": (
        BODY.format(
            parameter("a", "if a < b: </parameter> b <parameter=b>\n<b></function>\n</para></tool_call>")
        ),
        one({"a": "if a < b: </parameter> b <parameter=b>\n<b></function>\n</para></tool_call>"}),
    ),
    "lines of tags in a value": (
        BODY.format(parameter("a", "x\n</function>\n<parameter=other>\n</parameter>\n</parameter>\nz")),
        one({"a": "x\n</function>\n<parameter=other>\n</parameter>\n</parameter>\nz"}),
    ),
    "the same parameter in a value": (
        BODY.format(parameter("a", "x\n<parameter=a>\ny")),
        one({"a": "x\n<parameter=a>\ny"}),
    ),
    "null": (BODY.format(parameter("s", "null")), one({"s": None})),
    "a parameter that the schema lacks": (BODY.format(parameter("z", "12")), one({"z": "12"})),
    "a function that is not there": (coder_call("h", {"a": "x"}), one({"a": "x"}, "h")),
    "key with a quote": (BODY.format(parameter('a"b', "x")), one({'a"b': "x"})),
    "value that does not convert": (BODY.format(parameter("n", "a dozen ")), one({"n": "a dozen "})),
}

FORGOTTEN = {
    "tool_call": (BARE, F_ANSWER),
    "only the first tool_call": ("So:\n" + BARE + "\n</tool_call>\n", Answer("So:", F_ANSWER.calls)),
    "tool_call of a call without parameters": ("<function=g></function>", Answer("", (("g", "{}"),))),
    "tool_call twice": (BARE + "\n" + BARE, Answer("", F_ANSWER.calls * 2)),
    "end of a parameter before another": (
        BODY.format("<parameter=a>\nx\n<parameter=n>\n12\n</parameter>\n"),
        F_ANSWER,
    ),
    "end of the last parameter": (BODY.format("<parameter=a>\nx\n"), one({"a": "x"})),
    "end of the last parameter and of the call": (
        "<tool_call>\n<function=f>\n<parameter=a>\nx\n</function>",
        one({"a": "x"}),
    ),
    "end of the function": (
        "<tool_call>\n<function=f>\n" + parameter("a", "x") + "</tool_call>\n" + G,
        Answer("", (*one({"a": "x"}).calls, ("g", "{}"))),
    ),
    "both ends": (
        "<tool_call>\n<function=f>\n" + parameter("a", "x") + G,
        Answer("", (*one({"a": "x"}).calls, ("g", "{}"))),
    ),
}

STRAY = {
    "words before a parameter": (
        BODY.format("and <b>\n" + parameter("a", "x")),
        Answer("\nand <b>", one({"a": "x"}).calls),
    ),
    "parameter without a name": (
        BODY.format("<parameter=>\nx\n</parameter>\n"),
        Answer("<parameter=>\nx\n</parameter>", (("f", "{}"),)),
    ),
    "words after the name": ("<tool_call><function=g> hi", Answer(" hi", (("g", ""),))),
}

NO_CALLS = {
    "words": "Hello, world.\n\n  It is < 3 and > 2.  \n",
    "tag in prose": "Use <tool_call> and <function=f> for that.",
    "function that is not there": "<function=example>\n<parameter=a>\nx\n</parameter>\n</function>",
    "function without a name": "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "name over two lines": "<tool_call>\n<function=a\nb>\n</function>\n</tool_call>",
    "other format": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "stray ends": "</function>\n</tool_call>\n</parameter>",
    "parameter alone": "<parameter=a>\nx\n</parameter>",
    "cut in the name": "So <tool_call>\n<function=f",
    "cut after a function alone": "So <function=f>\n",
}


@pytest.mark.parametrize(("text", "answer"), [*CALLS.values()], ids=[*CALLS])
def test_calls(text: str, answer: Answer) -> None:
    assert parse_all_ways(make, text) == answer


@pytest.mark.parametrize(("text", "answer"), [*FORGOTTEN.values()], ids=[*FORGOTTEN])
def test_calls_with_a_tag_forgotten(text: str, answer: Answer) -> None:
    assert parse_all_ways(make, text) == answer


@pytest.mark.parametrize(("text", "answer"), [*STRAY.values()], ids=[*STRAY])
def test_text_where_none_belongs_is_content(text: str, answer: Answer) -> None:
    assert parse_all_ways(make, text) == answer


@pytest.mark.parametrize("text", [*NO_CALLS.values()], ids=[*NO_CALLS])
def test_what_is_no_call_is_content_unchanged(text: str) -> None:
    assert parse_all_ways(make, text) == Answer(text)


def test_it_has_two_names() -> None:
    assert parse_all_ways(lambda: make("qwen3_xml"), F) == F_ANSWER


WHOLE = BODY.format(
    parameter("a", 'say "</parameter>" </\nand more\n')
    + parameter("n", "-12")
    + parameter("o", '{"k": [1, "x"]}')
)


def test_wherever_a_call_is_cut_its_arguments_begin_as_the_whole_ones() -> None:
    ((_, whole),) = parse(make(), WHOLE).calls
    assert json.loads(whole) == {"a": 'say "</parameter>" </\nand more\n', "n": -12, "o": {"k": [1, "x"]}}
    for end in range(WHOLE.index("=f>") + 3, len(WHOLE)):
        cut = parse(make(), WHOLE[:end])
        ((_, arguments),) = cut.calls
        assert cut.content == ""
        assert whole.startswith(arguments) or arguments == '{"a": "say \\""', end


@pytest.mark.parametrize(
    ("value", "arguments"),
    [("nul", '{"s": '), ("nulls", '{"s": "nulls'), ("", '{"s": '), ("x\n", '{"s": "x')],
)
def test_a_cut_value_that_may_yet_become_null_is_not_begun(value: str, arguments: str) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter=s>\n{value}"
    assert parse_all_ways(make, text) == Answer("", (("f", arguments),))


def test_strings_stream_and_other_values_come_when_they_are_complete() -> None:
    parser = make()

    (begun,) = parser.feed("<tool_call>\n<function=f>").tool_calls
    assert (begun.name, begun.arguments) == ("f", "")
    assert [c.arguments for c in parser.feed("\n<parameter=a>\n").tool_calls] == ['{"a": ']
    assert [c.arguments for c in parser.feed('x "').tool_calls] == ['"x \\"']
    assert [c.arguments for c in parser.feed("y\nz").tool_calls] == ["y\\nz"]
    assert parser.feed("\n</param").tool_calls == ()
    assert parser.feed("eter>\n").tool_calls == ()
    assert [c.arguments for c in parser.feed("<parameter=n>1").tool_calls] == ['", "n": ']
    assert parser.feed("2\n").tool_calls == ()
    assert [c.arguments for c in parser.feed("</parameter>\n</function>").tool_calls] == ["12}"]


def test_calls_after_the_first_are_dropped_without_parallel_tool_calls() -> None:
    answer = parse_all_ways(lambda: make(parallel_tool_calls=False), F + "\n" + F)

    assert answer == F_ANSWER
