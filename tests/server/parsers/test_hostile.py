"""Text made to cost time or to break the parser: work stays linear, nothing is raised, nothing is lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from moe_runtime.server.parsers import OutputParser, make_output_parser
from tests.server.parsers.formats import parse, tool

PARSERS = ["hermes", "qwen3_coder"]
LONG = 'some words, "more" words\\ and\n a <b>é</b>; ' * 25_000
HERMES = '<tool_call>{"name": "f", "arguments": {"a": "'
CODER = "<tool_call>\n<function=f>\n<parameter={}>\n"


def make(tool_call_parser: str, **more: Any) -> OutputParser:
    tools = [tool("f", a="string", o="object", n="number", s={"type": ["null", "string"]})]
    return make_output_parser(
        tool_call_parser=tool_call_parser, reasoning_parser="qwen3", tools=tools, **more
    )


def in_pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def count_calls(parser: OutputParser, pieces: Iterable[str]) -> int:
    """How many functions, Python's and C's, are called to parse `pieces`."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
    finally:
        sys.setprofile(None)
    return count


# What comes first, and what is repeated.
HOSTILE = {
    "words": ("", "some words "),
    "white space": ("", " \n"),
    "beginnings of tags": ("", "<"),
    "tags": ("", "<tool_call>"),
    "half tags": ("", "<tool_cal"),
    "ends": ("", "</tool_call>"),
    "think tags": ("<think>", "<think>\n"),
    "calls in reasoning": ("<think>", "\n<tool_call>\n"),
    "calls": ("", '<tool_call>{"name":"f","arguments":{}}</tool_call>'),
    "keys that never end": ('<tool_call>{"', r"\""),
    "keys": ('<tool_call>{"a":1', ',"b":{"name":"f"}'),
    "tags in keys": ("", '<tool_call>{"'),
    "arguments without a name": ('<tool_call>{"arguments": {"a": "', "<tool_call>{"),
    "brackets": ('<tool_call>{"name": "f", "arguments": ', '{"a":['),
    "brackets too many": ('<tool_call>{"name": "f", "arguments": {}', "}"),
    "ends of lines in a string": (HERMES, "\n<"),
    "white space in a string": (HERMES, "\n "),
    "escapes": (HERMES, "\\"),
    "code units": (HERMES, r"\u"),
    "arguments encoded twice": ('<tool_call>{"name": "f", "arguments": "', r"\""),
    "functions": ("", "<function=f>\n"),
    "names": ("", "<function=f"),
    "parameters": (CODER.format("a"), "\n<parameter=a>"),
    "parameters in turn": ("<function=f>", "<parameter=a>1</parameter>"),
    "ends of parameters": (CODER.format("a"), "</parameter>"),
    "ends of parameters and white space": (CODER.format("a"), "\n</parameter>\n   "),
    "ends of functions": (CODER.format("a"), "\n</function>\n"),
    "names of parameters": (CODER.format("a"), "\n<parameter=x"),
    "empty lines": (CODER.format("a"), "\n"),
    "object": (CODER.format("o"), "{'a': ["),
    "quotes": (CODER.format("o") + "{", "'"),
    "number": (CODER.format("n"), "0"),
    "null": (CODER.format("s"), "null"),
    "junk in a function": ("<tool_call><function=f>", "x <"),
    "parameters without a name": ("<tool_call><function=f>", "<parameter=\n"),
}


@pytest.mark.parametrize("tool_call_parser", PARSERS)
@pytest.mark.parametrize(("start", "repeated"), [*HOSTILE.values()], ids=[*HOSTILE])
@pytest.mark.parametrize("size", [1, 250], ids=["by character", "in large pieces"])
def test_work_grows_with_the_text_and_no_faster(
    tool_call_parser: str, start: str, repeated: str, size: int
) -> None:
    def work(length: int) -> int:
        text = (start + repeated * (length // len(repeated) + 1))[:length]
        return count_calls(make(tool_call_parser), in_pieces(text, size))

    length = 250 if size == 1 else 1000
    assert work(4 * length) <= 4.5 * work(length) + 200


@pytest.mark.parametrize("tool_call_parser", PARSERS)
@pytest.mark.parametrize(
    "tag", ["<tool_call>", "</tool_call>", "<function=x>", "</think>", "<tool_call>\n", "<<"]
)
def test_ten_thousand_tags_are_content(tool_call_parser: str, tag: str) -> None:
    text = tag * 10_000
    assert parse(make(tool_call_parser), text).content == text


SIZES = [64, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
def test_a_megabyte_of_arguments(size: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": ' + json.dumps({"a": LONG}) + "}</tool_call>"
    ((_, arguments),) = parse(make("hermes"), *in_pieces(text, size)).calls
    assert json.loads(arguments) == {"a": LONG}


@pytest.mark.parametrize("size", SIZES)
def test_a_megabyte_of_a_value(size: int) -> None:
    text = CODER.format("a") + LONG + "\n</parameter>\n</function>\n</tool_call>"
    ((_, arguments),) = parse(make("qwen3_coder"), *in_pieces(text, size)).calls
    assert json.loads(arguments) == {"a": LONG}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tool_call_parser", PARSERS)
def test_a_megabyte_of_content(tool_call_parser: str, size: int) -> None:
    assert parse(make(tool_call_parser), *in_pieces(LONG, size)).content == LONG


def test_arguments_nested_deeply_pass_through() -> None:
    nested = '{"a":' * 20_000 + "1" + "}" * 20_000
    text = f'<tool_call>{{"name": "f", "arguments": {nested}}}</tool_call>'
    assert parse(make("hermes"), text).calls == (("f", nested),)


def test_an_object_nested_too_deeply_to_be_checked_stays_a_string() -> None:
    nested = '{"a":' * 20_000 + "1" + "}" * 20_000
    text = CODER.format("o") + nested + "\n</parameter>\n</function>\n</tool_call>"
    ((_, arguments),) = parse(make("qwen3_coder"), text).calls
    assert json.loads(arguments) == {"o": nested}


def test_thousands_of_calls() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n' * 3_000
    assert parse(make("hermes"), text).calls == (("f", "{}"),) * 3_000
