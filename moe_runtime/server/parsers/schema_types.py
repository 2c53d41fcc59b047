"""Which JSON types a tool's own schema allows a parameter to have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

JsonType = Literal["null", "boolean", "integer", "number", "string", "array", "object"]
Schema = Mapping[str, Any]

JSON_TYPES: tuple[JsonType, ...] = ("null", "boolean", "integer", "number", "string", "array", "object")
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")


def parameter_types(parameters: Schema, name: str) -> tuple[JsonType, ...]:
    """Types of the parameter `name` in the order that the schema gives them; ("string",) where it gives none.

    `parameters` is the function's own schema, of an object. References within it are followed.
    """
    schema = _lookup(parameters, "properties", name)
    if schema is None:
        schema = parameters.get("additionalProperties")
    return tuple(dict.fromkeys(_types(schema, parameters))) or ("string",)


def _lookup(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _types(schema: Any, root: Schema) -> Iterator[JsonType]:
    pending, seen = [schema], set()
    while pending:
        schema = pending.pop()
        if not isinstance(schema, Mapping) or id(schema) in seen:
            continue
        seen.add(id(schema))  # references may go in circles
        if "type" in schema:
            names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            yield from (known for name in names for known in JSON_TYPES if known == name)
        elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
            yield from map(_type_of, values)
        elif isinstance(schema.get("$ref"), str):
            pending.append(_resolve(schema["$ref"], root))
        elif alternatives := next((schema[key] for key in _ALTERNATIVES if key in schema), None):
            pending.extend(reversed(alternatives if isinstance(alternatives, list) else []))
        elif "properties" in schema:
            yield "object"
        elif "items" in schema:
            yield "array"


def _resolve(pointer: str, root: Schema) -> Any:
    """The schema that "#/a/b" points to; None if it points outside `root` or at nothing."""
    if not pointer.startswith("#"):
        return None
    keys = [key.replace("~1", "/").replace("~0", "~") for key in pointer[1:].split("/")[1:]]
    return _lookup(root, *keys)


def _type_of(value: object) -> JsonType:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, Sequence) else "object"
