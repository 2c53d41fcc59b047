"""Which parsers there are, by vLLM's names."""

from __future__ import annotations

from typing import Literal

from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.server.parsers.reasoning import REASONING_PARSERS

TOOL_CALL_PARSERS = ("hermes", "qwen3_coder", "qwen3_xml")

Kind = Literal["tool_call", "reasoning"]


def parser_names(kind: Kind) -> list[str]:
    """Names that `--tool-call-parser` or `--reasoning-parser` takes."""
    return sorted(TOOL_CALL_PARSERS if kind == "tool_call" else REASONING_PARSERS)


def check_parser_name(kind: Kind, name: str | None) -> None:
    """Raise ConfigError if there is no such parser; None stands for no parser and is fine."""
    names = parser_names(kind)
    if name is not None and name not in names:
        flag = f"--{kind.replace('_', '-')}-parser"
        hint = did_you_mean(name, names)
        raise ConfigError(f"{flag} has no parser {name!r}{hint}; it has {', '.join(names)}")
