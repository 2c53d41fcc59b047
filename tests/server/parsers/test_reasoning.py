"""Reasoning between <think> and </think>."""

from __future__ import annotations

import pytest

from moe_runtime.server.parsers import (
    OutputParser,
    make_output_parser,
    parser_names,
    prompt_ends_in_reasoning,
)
from tests.server.parsers.formats import Answer, coder_call, hermes_call, parse_all_ways, tool


def make(name: str, prompt_ends: bool | None = None, calls: str | None = None) -> OutputParser:
    return make_output_parser(
        tool_call_parser=calls,
        reasoning_parser=name,
        tools=[tool("f", a="string")] if calls else [],
        prompt_ends_in_reasoning=prompt_ends,
    )


# Text; what it means where the prompt holds no block; where the prompt ends inside one.
CASES = {
    "block": (
        "<think>\nHm, 2 < 3.\n\nYes.\n</think>\n\n  Hello.\n",
        Answer("  Hello.\n", reasoning="Hm, 2 < 3.\n\nYes."),
        Answer("  Hello.\n", reasoning="Hm, 2 < 3.\n\nYes."),
    ),
    "end only": (
        "Hm.\n</think>\n\nHello.",
        Answer("Hm.\n</think>\n\nHello."),
        Answer("Hello.", reasoning="Hm."),
    ),
    "no tags": ("Hello <b>.\n", Answer("Hello <b>.\n"), Answer(reasoning="Hello <b>.\n")),
    "cut": ("<think>Hm.\n\nI th", Answer(reasoning="Hm.\n\nI th"), Answer(reasoning="Hm.\n\nI th")),
    "cut in the end": ("<think>Hm\n</thi", Answer(reasoning="Hm\n</thi"), Answer(reasoning="Hm\n</thi")),
    "empty block": ("<think>\n\n</think>\n\nHi", Answer("Hi"), Answer("Hi")),
    "nothing after": ("<think>Hm</think>\n\n", Answer(reasoning="Hm"), Answer(reasoning="Hm")),
    "space before": ("\n<think>Hm</think>Hi", Answer("Hi", reasoning="Hm"), Answer("Hi", reasoning="Hm")),
    "begun in place of ended": (
        "<think>a</think <think> <</think>b</think>c",
        Answer("b</think>c", reasoning="a</think <think> <"),
        Answer("b</think>c", reasoning="a</think <think> <"),
    ),
    "later block": (
        " Use <think>x</think>.",
        Answer(" Use <think>x</think>."),
        Answer(".", reasoning=" Use <think>x"),
    ),
    "empty": ("", Answer(), Answer()),
    "line breaks": ("\n\n", Answer("\n\n"), Answer()),
    "cut tag": ("<thin", Answer("<thin"), Answer(reasoning="<thin")),
}


@pytest.mark.parametrize(("text", "alone", "inside"), [*CASES.values()], ids=[*CASES])
def test_reasoning(text: str, alone: Answer, inside: Answer) -> None:
    assert parse_all_ways(lambda: make("qwen3"), text) == alone
    assert parse_all_ways(lambda: make("qwen3", False), text) == alone
    assert parse_all_ways(lambda: make("qwen3", True), text) == inside


@pytest.mark.parametrize(("text", "alone", "inside"), [*CASES.values()], ids=[*CASES])
def test_deepseek_r1_is_inside_unless_the_prompt_says_otherwise(
    text: str, alone: Answer, inside: Answer
) -> None:
    assert parse_all_ways(lambda: make("deepseek_r1"), text) == inside
    assert parse_all_ways(lambda: make("deepseek_r1", False), text) == alone


@pytest.mark.parametrize("name", parser_names("reasoning"))
def test_every_parser_reads_a_block(name: str) -> None:
    assert parse_all_ways(lambda: make(name), "<think>Hm</think>Hi") == Answer("Hi", reasoning="Hm")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", None),
        ("<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", None),
        ("", None),
    ],
)
def test_what_a_prompt_says_of_reasoning(prompt: str, expected: bool | None) -> None:
    assert prompt_ends_in_reasoning(prompt) is expected


def test_without_a_parser_tags_are_content() -> None:
    parser = make_output_parser(tool_call_parser=None, reasoning_parser=None, prompt_ends_in_reasoning=True)
    assert parser.feed("<think>a</think>b").content == "<think>a</think>b"


@pytest.mark.parametrize(
    ("calls", "call"),
    [("hermes", hermes_call("f", {"a": "x"})), ("qwen3_coder", coder_call("f", {"a": "x"}))],
)
def test_calls_after_reasoning(calls: str, call: str) -> None:
    answer = parse_all_ways(lambda: make("qwen3", True, calls), "Hm.\n</think>\n\nHere:\n" + call)
    assert answer == Answer("Here:", (("f", '{"a": "x"}'),), "Hm.")


def test_a_coder_call_ends_reasoning_that_was_not_closed() -> None:
    answer = parse_all_ways(
        lambda: make("qwen3", True, "qwen3_coder"), "Hm.\n\n" + coder_call("f", {"a": "x"})
    )
    assert answer == Answer("", (("f", '{"a": "x"}'),), "Hm.")


@pytest.mark.parametrize(
    "thought",
    [
        "I write <tool_call>\n<function=f>",  # within a line
        "a\n<tool_call>\nand so on",
        "a\n<tool_call>\n<func",
        hermes_call("f", {}),
    ],
)
def test_a_call_that_is_only_thought_of_is_reasoning(thought: str) -> None:
    answer = parse_all_ways(lambda: make("qwen3", True, "qwen3_coder"), thought + "</think>b")
    assert answer == Answer("b", (), thought)


def test_reasoning_streams() -> None:
    parser = make("qwen3", True)

    assert parser.feed("Hm, ").reasoning == "Hm, "
    assert parser.feed("so\n").reasoning == "so"
    assert parser.feed("</thi").reasoning == ""
    delta = parser.feed("nk>\n\nHi")
    assert (delta.reasoning, delta.content) == ("", "Hi")
