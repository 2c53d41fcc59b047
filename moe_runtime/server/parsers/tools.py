"""What a request says of its tools, in the shape of chat completions or of responses, and whether that is sound."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.server.parsers.names import parser_names
from moe_runtime.server.parsers.schema_types import Schema

Tools = Sequence[Mapping[str, Any]]

# What no format of calls can hold in a name.
_NAME = re.compile(r"[\w.:/-]{1,256}")
_MAX_DEPTH = 100  # of a schema's lists and objects within each other
_CHOICES: tuple[Literal["auto", "none", "required"], ...] = ("auto", "none", "required")
_SHAPE = '{"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """The choice of one function, which must be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedFunction


def function_schemas(tools: Tools) -> dict[str, Schema]:
    """Schema of the parameters of each function; of one that gives none, that of an empty object."""
    functions = [_function(tool) for tool in tools]
    no_parameters = {"type": "object", "properties": {}}
    return {f["name"]: p if (p := f.get("parameters")) is not None else no_parameters for f in functions}


def read_tool_choice(tool_choice: object, tools: Tools) -> ToolChoice:
    """The request's `tool_choice` by its meaning: None is "auto" where there are tools, "none" where there are not.

    Raises:
        ConfigError: it is neither "auto", "none" or "required" nor one function.
    """
    if tool_choice is None:
        return "auto" if tools else "none"
    for known in _CHOICES:
        if tool_choice == known:
            return known
    if isinstance(tool_choice, str):
        hint = did_you_mean(tool_choice, _CHOICES)
        raise ConfigError(
            f"tool_choice is {tool_choice!r}{hint}; it must be {', '.join(_CHOICES)} or {_SHAPE}"
        )
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        function = _function(tool_choice)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return NamedFunction(function["name"])
    raise ConfigError(f"tool_choice must be {', '.join(_CHOICES)} or {_SHAPE}, got {_short(tool_choice)}")


def validate_tools(tools: Tools | None, tool_choice: object, *, can_parse_calls: bool = False) -> ToolChoice:
    """Check a request's `tools` and `tool_choice`; the choice by its meaning.

    Args:
        can_parse_calls: the server was started with `--enable-auto-tool-choice` and `--tool-call-parser`,
            without which only structured output can lead to a call.

    Raises:
        ConfigError: one line that names the field, what it holds and what it must hold.
    """
    names = _checked_names(tools or ())
    choice = read_tool_choice(tool_choice, tools or ())
    if isinstance(choice, NamedFunction) and choice.name not in names:
        have = f"tools has {', '.join(names)}" if names else "tools is empty"
        raise ConfigError(
            f"tool_choice names the function {choice.name!r}{did_you_mean(choice.name, names)}; {have}"
        )
    if choice == "required" and not names:
        raise ConfigError("tool_choice is 'required' but tools is empty; give the functions to choose from")
    if choice == "auto" and names and not can_parse_calls:
        raise ConfigError(
            "tool_choice 'auto' needs a server started with --enable-auto-tool-choice --tool-call-parser NAME "
            f"(one of {', '.join(parser_names('tool_call'))}); 'none', 'required' and one function work without"
        )
    return choice


def _checked_names(tools: object) -> list[str]:
    if not isinstance(tools, list | tuple):
        raise ConfigError(f"tools must be a list, got {_short(tools)}")
    names: list[str] = []
    for i, tool in enumerate(tools):
        name = _checked_name(tool, f"tools[{i}]")
        if name in names:
            raise ConfigError(
                f"tools[{i}] has the name {name!r} of tools[{names.index(name)}]; rename one of them"
            )
        names.append(name)
    return names


def _checked_name(tool: object, where: str) -> str:
    """The name of one tool, all of which has been checked."""
    if not isinstance(tool, Mapping):
        raise ConfigError(f"{where} must be an object, got {_short(tool)}")
    if tool.get("type", "function") != "function":
        raise ConfigError(f"{where}.type is {_short(tool['type'])}; only 'function' can be served")
    function = _function(tool)
    where += ".function" if "function" in tool else ""
    if not isinstance(function, Mapping):
        raise ConfigError(f"{where} must be an object, got {_short(function)}")
    name = function.get("name")
    if name is None:
        raise ConfigError(f"{where}.name is missing; give the function a name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}.name must be 1 to 256 letters, digits, or _ . : / -, got {_short(name)}")
    _check_parameters(function.get("parameters"), f"{where}.parameters")
    return name


def _check_parameters(schema: object, where: str) -> None:
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{where} must be a JSON schema of an object, got {_short(schema)}")
    if schema.get("type", "object") != "object":
        raise ConfigError(f"{where}.type must be 'object', got {_short(schema['type'])}")
    if not isinstance(schema.get("properties", {}), Mapping):
        raise ConfigError(f"{where}.properties must be an object, got {_short(schema['properties'])}")
    if _is_too_deep(schema):
        raise ConfigError(f"{where} is nested more than {_MAX_DEPTH} deep; make the schema flatter")


def _is_too_deep(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        containers = [
            v.values() if isinstance(v, Mapping) else v for v in level if isinstance(v, Mapping | list)
        ]
        level = [item for container in containers for item in container]
    return any(isinstance(item, Mapping | list) for item in level)


def _function(tool: Mapping[str, Any]) -> Any:
    """What describes the function: chat completions wrap it, responses do not."""
    return tool.get("function", tool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
