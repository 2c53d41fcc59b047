"""Flags that say in which formats a model calls functions and reasons."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser_arguments(group: Any) -> None:
    """vLLM's names."""
    group.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="let the model call functions by choice; needs --tool-call-parser",
    )
    group.add_argument(
        "--tool-call-parser", metavar="NAME", help="format of the model's calls: hermes, qwen3_coder"
    )
    group.add_argument(
        "--reasoning-parser", metavar="NAME", help="format of the model's reasoning: qwen3, deepseek_r1, ..."
    )


def parser_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Their fields of ServerConfig."""
    return {
        "enable_auto_tool_choice": args.enable_auto_tool_choice,
        "tool_call_parser": args.tool_call_parser,
        "reasoning_parser": args.reasoning_parser,
    }
