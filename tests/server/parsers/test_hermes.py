"""Hermes's format: a JSON object between <tool_call> and </tool_call>."""

from __future__ import annotations

import json

import pytest

from moe_runtime.server.parsers import OutputParser, fold, make_output_parser
from tests.server.parsers.formats import Answer, hermes_call, parse, parse_all_ways, tool

TOOLS = [tool("f", a="string"), tool("g")]


def make(parallel_tool_calls: bool = True) -> OutputParser:
    return make_output_parser(
        tool_call_parser="hermes", reasoning_parser=None, tools=TOOLS, parallel_tool_calls=parallel_tool_calls
    )


F = hermes_call("f", {"a": "x"})
F_CALL = ("f", '{"a": "x"}')
G = hermes_call("g", {})

CALLS = {
    "one call": (F, Answer("", (F_CALL,))),
    "text before": ("Let me see.\n" + F, Answer("Let me see.", (F_CALL,))),
    "text after": (F + "\nDone.", Answer("\nDone.", (F_CALL,))),
    "text around": ("A\n" + F + "\nB", Answer("A\nB", (F_CALL,))),
    "white space only": ("\n\n" + F + "\n\n", Answer("", (F_CALL,))),
    "two calls": (F + "\n" + G, Answer("", (F_CALL, ("g", "{}")))),
    "two calls together": (F + G, Answer("", (F_CALL, ("g", "{}")))),
    "text between": (F + " and " + G, Answer(" and", (F_CALL, ("g", "{}")))),
    "one line": (
        '<tool_call>{"name":"f","arguments":{"a":"x"}}</tool_call>',
        Answer("", (("f", '{"a":"x"}'),)),
    ),
    "parameters": (
        '<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>',
        Answer("", (("f", '{"a":1}'),)),
    ),
    "arguments first": (
        '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "f"}</tool_call>',
        Answer("", (("f", '{"a": "</tool_call>"}'),)),
    ),
    "no arguments": ('<tool_call>{"name": "g"}</tool_call>', Answer("", (("g", "{}"),))),
    "null arguments": ('<tool_call>{"name": "g", "arguments": null}</tool_call>', Answer("", (("g", "{}"),))),
    "other keys": (
        '<tool_call>{"id": [1, {"name": "h"}], "name": "f", "x": "}", "arguments": {}, "y": 1.5}</tool_call>',
        Answer("", (("f", "{}"),)),
    ),
    "nested": (
        '<tool_call>{"name": "f", "arguments": {"a": {"name": "g", "arguments": [{}, [[]], "}"]}}}</tool_call>',
        Answer("", (("f", '{"a": {"name": "g", "arguments": [{}, [[]], "}"]}}'),)),
    ),
    "quotes and braces in strings": (
        r'<tool_call>{"name": "f", "arguments": {"a": "mkdir -p {x,y \"}\" \\"}}</tool_call>',
        Answer("", (("f", r'{"a": "mkdir -p {x,y \"}\" \\"}'),)),
    ),
    "unicode": (
        r'<tool_call>{"name": "f", "arguments": {"a": "é\u00e9\ud83d\ude00 😀"}}</tool_call>',
        Answer("", (("f", r'{"a": "é\u00e9\ud83d\ude00 😀"}'),)),
    ),
    "tags in strings": (
        '<tool_call>{"name": "f", "arguments": {"a": "<tool_call>{}</tool_call> <b>"}}</tool_call>',
        Answer("", (("f", '{"a": "<tool_call>{}</tool_call> <b>"}'),)),
    ),
    "arguments encoded twice": (
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"x\"}"}</tool_call>',
        Answer("", (F_CALL,)),
    ),
    "name escaped": (
        r'<tool_call>{"name": "\u0066", "arguments": {}}</tool_call>',
        Answer("", (("f", "{}"),)),
    ),
}

MENDED = {
    "raw line break in a string": (
        '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty\x01"}}</tool_call>',
        Answer("", (("f", r'{"a": "x\n\ty\u0001"}'),)),
    ),
    "backslashes that begin no escape": (
        r'<tool_call>{"name": "f", "arguments": {"a": "C:\users \d \u12 it\'s"}}</tool_call>',
        Answer("", (("f", r'{"a": "C:\\users \\d \\u12 it' + "'s\"}"),)),
    ),
    "outer brace missing": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}\n</tool_call>' + G,
        Answer("", (F_CALL, ("g", "{}"))),
    ),
    "braces too many": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}}}\n</tool_call>' + G,
        Answer("", (F_CALL, ("g", "{}"))),
    ),
    "end missing": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n' + G,
        Answer("", (F_CALL, ("g", "{}"))),
    ),
    "inner brace missing": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1\n</tool_call>' + G,
        Answer("", (("f", '{"a": 1\n'), ("g", "{}"))),
    ),
    "quote missing": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "x\n</tool_call>\n' + G,
        Answer("", (("f", '{"a": "x'), ("g", "{}"))),
    ),
    "arguments that are no JSON": (
        '<tool_call>{"name": "f", "arguments": {"a": True <b>}}</tool_call>',
        Answer("", (("f", '{"a": True <b>}'),)),
    ),
    "text within a call": (
        '<tool_call>{"name": "f", oops}</tool_call>',
        Answer("oops}</tool_call>", (("f", ""),)),
    ),
}

CUT = {
    "in the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "b', Answer("", (("f", '{"a": "b'),))),
    "in an escape": (r'<tool_call>{"name": "f", "arguments": {"a": "b\u00', Answer("", (("f", '{"a": "b'),))),
    "after the name": ('<tool_call>{"name": "f", "arg', Answer("", (("f", ""),))),
    "before the end": ('<tool_call>{"name": "f", "arguments": {"a": "x"}', Answer("", (F_CALL,))),
    "in the end": (F[:-3], Answer("", (F_CALL,))),
    "in the name": ('Hm <tool_call>{"name": "f', Answer('Hm <tool_call>{"name": "f')),
}

NO_CALLS = {
    "empty": "",
    "white space": " \n\n\t ",
    "words": "Hello, world.\n\n  It is < 3 and > 2.  \n",
    "end of a call": "a </tool_call> b",
    "begun tags": "<<tool_call <tool_cal <tool_callx> <TOOL_CALL>{",
    "tag in prose": "Write <tool_call> and {\n</tool_call>, then <tool_call>\n[1]</tool_call>",
    "object without a name": '<tool_call>{"nom": "f", "arguments": {"a": "x"}}</tool_call>',
    "template's own words": '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    "empty name": '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    "name that is no string": '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    "half a surrogate pair as the name": r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>',
    "broken key": '<tool_call>{"na\nme": "f"}</tool_call>',
    "other format": "<tool_call>\n<function=f>\n</function>\n</tool_call>",
    "tag at the end": "Look: <tool_call>",
}


@pytest.mark.parametrize(("text", "answer"), [*CALLS.values()], ids=[*CALLS])
def test_calls(text: str, answer: Answer) -> None:
    assert parse_all_ways(make, text) == answer
    for _, arguments in answer.calls:
        json.loads(arguments)


@pytest.mark.parametrize(("text", "answer"), [*MENDED.values()], ids=[*MENDED])
def test_malformed_calls(text: str, answer: Answer) -> None:
    assert parse_all_ways(make, text) == answer


@pytest.mark.parametrize(("text", "answer"), [*CUT.values()], ids=[*CUT])
def test_a_call_that_is_cut_off_gives_what_was_there(text: str, answer: Answer) -> None:
    assert parse_all_ways(make, text) == answer


@pytest.mark.parametrize("text", [*NO_CALLS.values()], ids=[*NO_CALLS])
def test_what_is_no_call_is_content_unchanged(text: str) -> None:
    assert parse_all_ways(make, text) == Answer(text)


@pytest.mark.parametrize("call", ["nested", "quotes and braces in strings", "unicode", "tags in strings"])
def test_wherever_a_call_is_cut_its_arguments_begin_as_the_whole_ones(call: str) -> None:
    text, answer = CALLS[call]
    for end in range(text.index('"arguments"'), len(text)):
        cut = parse(make(), text[:end])
        assert cut.content == ""
        ((name, arguments),) = cut.calls
        assert name == "f"
        assert answer.calls[0][1].startswith(arguments)


def test_the_name_comes_as_soon_as_it_is_known_and_arguments_as_they_are_read() -> None:
    parser = make()

    assert parser.feed('<tool_call>\n{"name": "f').tool_calls == ()
    (begun,) = parser.feed('"').tool_calls
    assert (begun.index, begun.name, begun.arguments) == (0, "f", "")
    assert parser.feed(', "arguments": ').tool_calls == ()
    for piece in ('{"a": "b', " c", '", "d": [1', ", 2]}"):
        (delta,) = parser.feed(piece).tool_calls
        assert (delta.index, delta.id, delta.name, delta.arguments) == (0, None, None, piece)
    assert parser.feed("}\n</tool_call>").tool_calls == ()


def test_only_what_may_be_a_tag_is_held_back() -> None:
    parser = make()

    assert parser.feed("a <tool").content == "a"
    assert parser.feed("s> b").content == " <tools> b"
    assert parser.feed("\n").content == ""
    assert parser.feed("c").content == "\nc"


def test_calls_after_the_first_are_dropped_without_parallel_tool_calls() -> None:
    text = "A " + F + " B " + G + " C"
    answer = parse_all_ways(lambda: make(parallel_tool_calls=False), text)

    assert answer == Answer("A B C", (F_CALL,))


def test_ids_differ() -> None:
    deltas = [parser.feed(F * 5) for parser in (make(), make())]
    ids = [call.id for delta in deltas for call in fold([delta]).tool_calls]
    assert len(set(ids)) == len(ids) == 10
