"""Choosing a parser by name and by the request, and the finish reason that its findings lead to."""

from __future__ import annotations

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.server.parsers import (
    ParsedDelta,
    ToolCallDelta,
    check_parser_name,
    finish_reason,
    fold,
    make_output_parser,
    parser_names,
)
from tests.server.parsers.formats import Answer, coder_call, hermes_call, parse, tool

TOOLS = [tool("f", a="string")]
CALL = hermes_call("f", {"a": "x"})


def test_names_are_vllms() -> None:
    assert parser_names("tool_call") == ["hermes", "qwen3_coder", "qwen3_xml"]
    assert {"qwen3", "deepseek_r1"} <= set(parser_names("reasoning"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"tool_call_parser": "hermse", "reasoning_parser": None},
            "--tool-call-parser has no parser 'hermse'; did you mean 'hermes'?; it has hermes, qwen3_coder, qwen3_xml",
        ),
        (
            {"tool_call_parser": None, "reasoning_parser": "qwen"},
            "--reasoning-parser has no parser 'qwen'; did you mean 'qwen3'?; it has "
            + ", ".join(parser_names("reasoning")),
        ),
    ],
)
def test_unknown_names_are_refused(flags: dict[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_output_parser(**flags)
    assert str(error.value) == message


def test_names_are_checked_without_a_request() -> None:
    check_parser_name("tool_call", None)
    check_parser_name("tool_call", "hermes")
    with pytest.raises(ConfigError, match="has no parser"):
        check_parser_name("reasoning", "hermes")


@pytest.mark.parametrize(
    ("name", "tools", "tool_choice"),
    [("hermes", TOOLS, "none"), ("hermes", [], None), ("hermes", [], "auto"), (None, TOOLS, "auto")],
)
def test_calls_that_nobody_asked_for_are_content(
    name: str | None, tools: list[object], tool_choice: object
) -> None:
    parser = make_output_parser(
        tool_call_parser=name, reasoning_parser=None, tools=tools, tool_choice=tool_choice
    )
    assert parse(parser, CALL) == Answer(CALL)


@pytest.mark.parametrize(("name", "call"), [("hermes", CALL), ("qwen3_xml", coder_call("f", {"a": "x"}))])
def test_a_whole_answer(name: str, call: str) -> None:
    parser = make_output_parser(tool_call_parser=name, reasoning_parser="qwen3", tools=TOOLS)
    whole = fold([parser.feed("<think>\nHm\n</think>\n\nSo:\n" + call), parser.finish()])

    (found,) = whole.tool_calls
    assert whole == ParsedDelta(content="So:", reasoning="Hm", tool_calls=(found,))
    assert found == ToolCallDelta(index=0, id=found.id, name="f", arguments='{"a": "x"}')


def test_folding_joins_the_pieces_of_each_call() -> None:
    def piece(index: int, arguments: str, **begun: str) -> ParsedDelta:
        return ParsedDelta(tool_calls=(ToolCallDelta(index=index, arguments=arguments, **begun),))

    pieces = [piece(0, "{", id="x", name="f"), piece(0, "}"), piece(1, "{}", id="y", name="g")]
    assert fold([ParsedDelta(content="a"), *pieces, ParsedDelta(content="b", reasoning="c")]) == ParsedDelta(
        content="ab",
        reasoning="c",
        tool_calls=(
            ToolCallDelta(index=0, id="x", name="f", arguments="{}"),
            ToolCallDelta(index=1, id="y", name="g", arguments="{}"),
        ),
    )


@pytest.mark.parametrize(
    ("reason", "called", "tool_choice", "expected"),
    [
        ("stop", True, None, "tool_calls"),
        ("stop", True, "auto", "tool_calls"),
        ("stop", True, "required", "tool_calls"),
        ("stop", True, {"type": "function", "function": {"name": "f"}}, "stop"),
        ("stop", False, "auto", "stop"),
        ("length", True, "auto", "length"),
        ("abort", True, "auto", "abort"),
    ],
)
def test_finish_reason(reason: str, called: bool, tool_choice: object, expected: str) -> None:
    assert finish_reason(reason, called=called, tool_choice=tool_choice) == expected
