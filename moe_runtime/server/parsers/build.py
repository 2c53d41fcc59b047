"""The parser that a request needs, and the finish reason that it leads to."""

from __future__ import annotations

from moe_runtime.server.parsers.constrained import NamedCallParser, RequiredCallsParser
from moe_runtime.server.parsers.deltas import OutputParser, ParsedDelta, fold
from moe_runtime.server.parsers.hermes import HermesParser
from moe_runtime.server.parsers.names import check_parser_name
from moe_runtime.server.parsers.qwen3_coder import Qwen3CoderParser
from moe_runtime.server.parsers.reasoning import ReasoningParser, starts_in_reasoning
from moe_runtime.server.parsers.stream import ContentParser
from moe_runtime.server.parsers.tools import (
    NamedFunction,
    ToolChoice,
    Tools,
    function_schemas,
    read_tool_choice,
)


class ReasoningFirst:
    """An OutputParser that takes the reasoning off and gives the rest to another."""

    def __init__(self, reasoning: OutputParser, rest: OutputParser) -> None:
        self._reasoning = reasoning
        self._rest = rest

    def feed(self, text: str) -> ParsedDelta:
        split = self._reasoning.feed(text)
        return self._joined(split, self._rest.feed(split.content))

    def finish(self) -> ParsedDelta:
        split = self._reasoning.finish()
        return self._joined(split, fold([self._rest.feed(split.content), self._rest.finish()]))

    def _joined(self, split: ParsedDelta, rest: ParsedDelta) -> ParsedDelta:
        if not split.reasoning:
            return rest
        return ParsedDelta(content=rest.content, reasoning=split.reasoning, tool_calls=rest.tool_calls)


def make_output_parser(
    *,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
    tools: Tools = (),
    tool_choice: object = None,
    parallel_tool_calls: bool = True,
    prompt_ends_in_reasoning: bool | None = None,
    has_form: bool = False,
) -> OutputParser:
    """A parser for one answer.

    Args:
        tool_call_parser: format of calls that the model makes by choice; None: such calls stay content.
        reasoning_parser: format of the reasoning; None: it stays content.
        tools: of the request, validated.
        tool_choice: of the request. "required" and one function expect text that was held to
            `tool_choice_schema`; with "none", or without tools, there are no calls.
        parallel_tool_calls: if False, calls after the first are dropped.
        prompt_ends_in_reasoning: what `reasoning.prompt_ends_in_reasoning` says of the prompt. None leaves it to
            the format: some models' answers start with their reasoning even so.
        has_form: the text was held to a form, which begins after </think> and nowhere else.

    Raises:
        ConfigError: a parser's name or the choice is unknown.
    """
    check_parser_name("tool_call", tool_call_parser)
    check_parser_name("reasoning", reasoning_parser)
    choice = read_tool_choice(tool_choice, tools)
    max_calls = None if parallel_tool_calls else 1
    rest = _make_call_parser(tool_call_parser, tools, choice, max_calls)
    if reasoning_parser is None:
        return rest
    starts_open = starts_in_reasoning(reasoning_parser, prompt_ends_in_reasoning)
    return ReasoningFirst(
        ReasoningParser(
            starts_open=starts_open, ends_at_call=isinstance(rest, Qwen3CoderParser) and not has_form
        ),
        rest,
    )


def _make_call_parser(
    name: str | None, tools: Tools, choice: ToolChoice, max_calls: int | None
) -> OutputParser:
    if isinstance(choice, NamedFunction):
        return NamedCallParser(choice.name)
    if choice == "required":
        return RequiredCallsParser(max_calls)
    if choice == "none" or not tools or name is None:
        return ContentParser()
    return (
        HermesParser(max_calls) if name == "hermes" else Qwen3CoderParser(function_schemas(tools), max_calls)
    )


def finish_reason(reason: str, *, called: bool, tool_choice: object) -> str:
    """OpenAI's finish reason for the engine's.

    An answer that ended by itself and in which a function was `called` has "tool_calls", save where the request
    named the function: that has "stop", as OpenAI's does. One cut off keeps "length": its last call is incomplete.
    """
    by_choice = tool_choice in (None, "auto", "required")
    return "tool_calls" if reason == "stop" and called and by_choice else reason
