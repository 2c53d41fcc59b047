"""The JSON schema that makes a model call a function where the request says that it must."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime.server.parsers.schema_types import Schema
from moe_runtime.server.parsers.tools import NamedFunction, Tools, function_schemas, read_tool_choice

_NAMES_TO_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")


def tool_choice_schema(
    tools: Tools, tool_choice: object, *, parallel_tool_calls: bool = True
) -> dict[str, Any] | None:
    """Schema of the whole answer (after its reasoning, if any), or None where the choice asks for none.

    One named function: the schema of its parameters. "required": an array of one or more
    {"name": ..., "parameters": ...}, of just one without `parallel_tool_calls`. Tools must have been validated.
    """
    choice = read_tool_choice(tool_choice, tools)
    functions = function_schemas(tools)
    if isinstance(choice, NamedFunction):
        return _object_schema(functions[choice.name])
    if choice != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = [_call_schema(name, schema, definitions) for name, schema in functions.items()]
    array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel_tool_calls:
        array["maxItems"] = 1
    return {**array, "$defs": definitions} if definitions else array


def _call_schema(name: str, schema: Schema, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of one call; what the function's schema refers to within itself goes into `definitions`."""
    parameters = _object_schema(schema)
    key = f"parameters_{len(definitions)}"  # a function's own name could need escapes, which xgrammar cannot read
    moved = _move(parameters, f"#/$defs/{key}")
    if moved != parameters:
        definitions[key] = moved
        parameters = {"$ref": f"#/$defs/{key}"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [name]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _object_schema(schema: Schema) -> dict[str, Any]:
    says_type = any(key in schema for key in ("type", "$ref", "anyOf", "oneOf", "allOf"))
    return dict(schema) if says_type else {"type": "object", **schema}


def _move(schema: Any, root: str) -> Any:
    """`schema` with its references to itself leading to where it now is."""
    if isinstance(schema, list):
        return [_move(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMES_TO_SCHEMAS and isinstance(value, Mapping):
            moved[key] = {name: _move(item, root) for name, item in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        else:
            moved[key] = value if key in _DATA else _move(value, root)
    return moved
