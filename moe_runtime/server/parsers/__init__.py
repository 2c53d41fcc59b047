"""From a model's text to OpenAI's content, reasoning and tool calls, piece by piece as the text arrives."""

from moe_runtime.server.parsers.build import finish_reason, make_output_parser
from moe_runtime.server.parsers.choice_schema import tool_choice_schema
from moe_runtime.server.parsers.deltas import OutputParser, ParsedDelta, ToolCallDelta, fold
from moe_runtime.server.parsers.names import check_parser_name, parser_names
from moe_runtime.server.parsers.reasoning import prompt_ends_in_reasoning, tags_before_form
from moe_runtime.server.parsers.tools import NamedFunction, ToolChoice, validate_tools

__all__ = [
    "NamedFunction",
    "OutputParser",
    "ParsedDelta",
    "ToolCallDelta",
    "ToolChoice",
    "check_parser_name",
    "finish_reason",
    "fold",
    "make_output_parser",
    "parser_names",
    "prompt_ends_in_reasoning",
    "tags_before_form",
    "tool_choice_schema",
    "validate_tools",
]
