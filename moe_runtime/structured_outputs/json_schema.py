"""Checks of a JSON schema: everything that the grammar compiler would ignore is refused by name.

The list is of what is known to be enforced (tests/runtime/test_json_schema.py holds it against a validator's
verdict), so that what a later draft adds is refused too. What the compiler itself refuses or warns of, such as a
`oneOf` whose branches overlap, is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.structured_outputs.regex import check_regex

MAX_DEPTH = 64  # schemas within schemas

_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_ANNOTATIONS |= {"$schema", "$comment", "$defs", "definitions", "discriminator"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_LENGTHS = {"minLength", "maxLength"}
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_OF_TYPE: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties", "unevaluatedProperties", "patternProperties"}
    | {"propertyNames", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"},
    "string": {"pattern", "format", *_LENGTHS},
    "integer": {"multipleOf", *_BOUNDS},
    "number": _BOUNDS,
    "boolean": set(),
    "null": set(),
}
_COMBINERS = ("$ref", "anyOf", "oneOf", "allOf")
_KEYWORDS = [
    *sorted(_ANNOTATIONS),
    *_COMBINERS,
    "type",
    "enum",
    "const",
    *sorted(set().union(*_OF_TYPE.values())),
]
_FORMATS = {
    "date",
    "date-time",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uri-reference",
}
_FORMATS |= {"uri-template", "uuid", "json-pointer", "relative-json-pointer"}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def check_json_schema(schema: object) -> None:
    """Refuse, with ConfigError, a schema that could not be enforced to the letter."""
    if not isinstance(schema, Mapping):
        raise ConfigError(f"structured_outputs.json must be a JSON object (a schema), got {_short(schema)}")
    _Checker(schema).check({key: value for key, value in schema.items() if key != "$id"}, "", 0)


class _Checker:
    """One walk over a schema and all that its references lead to."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._references: set[str] = set()  # that have been followed

    def check(self, schema: object, path: str, depth: int, implied: str | None = None) -> None:
        """Check one schema; `implied` is the type that its place gives it."""
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise _refusal(path, f"a schema must be an object or a boolean, got {_short(schema)}")
        if depth > MAX_DEPTH:
            raise _refusal(path, f"schemas are nested more than {MAX_DEPTH} deep; use $defs")
        names = {name for name in schema if name not in _ANNOTATIONS and not name.startswith("x-")}
        names -= {"uniqueItems"} if schema.get("uniqueItems") is False else set()
        for group in ("$defs", "definitions"):
            self._check_each(schema.get(group, {}), f"{path}/{group}", depth)
        for combiner in _COMBINERS:
            if combiner in names:
                _refuse_beside(combiner, names - {combiner}, path)
                self._check_combiner(combiner, schema[combiner], path, depth)
                return
        if names & {"enum", "const"}:
            _refuse_beside("enum" if "enum" in names else "const", names - {"enum", "const", "type"}, path)
            _check_values(schema, path)
            return
        self._check_typed(schema, names, path, depth, implied)

    def _check_combiner(self, combiner: str, value: Any, path: str, depth: int) -> None:
        where = f"{path}/{combiner}"
        if combiner == "$ref":
            self._follow(value, where, depth)
            return
        if not isinstance(value, list) or not value:
            raise _refusal(where, f"must be a list of schemas, got {_short(value)}")
        if combiner == "allOf" and len(value) > 1:
            raise _refusal(where, "allOf of several schemas is not supported; merge them into one")
        for index, each in enumerate(value):
            self.check(each, f"{where}/{index}", depth + 1)

    def _follow(self, reference: Any, path: str, depth: int) -> None:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise _refusal(
                path, f"must lead to a place in the same schema ('#/$defs/...'), got {_short(reference)}"
            )
        if reference in self._references or reference == "#":
            return
        self._references.add(reference)
        target: Any = self._root
        for part in reference.split("/")[1:]:
            if "~" in part or "%" in part or not isinstance(target, Mapping) or part not in target:
                raise _refusal(
                    path, f"leads nowhere: {_short(reference)} (names with '~' or '%' are not supported)"
                )
            target = target[part]
        self.check(target, reference[1:], depth + 1)

    def _check_typed(
        self, schema: Mapping[str, Any], names: set[str], path: str, depth: int, implied: str | None
    ) -> None:
        types = schema.get("type", implied or _implied_type(names))
        types = [types] if isinstance(types, str) else types
        names = names - {"type"}
        if types is None:
            if names:
                name = min(names)
                hint = (
                    "give a type" if name in _KEYWORDS else f"no such keyword{did_you_mean(name, _KEYWORDS)}"
                )
                raise _refusal(path, f"{name} without a type is not supported; {hint}")
            return
        if not isinstance(types, list) or not types or not all(t in _OF_TYPE for t in map(str, types)):
            raise _refusal(
                f"{path}/type", f"must be of {', '.join(_OF_TYPE)}, got {_short(schema.get('type'))}"
            )
        for name in sorted(names):
            if not any(name in _OF_TYPE[each] for each in types):
                hint = "" if name in _KEYWORDS else did_you_mean(name, _KEYWORDS)
                raise _refusal(path, f"{name} is not supported for type {' or '.join(types)}{hint}")
        _check_counts(schema, path)
        if "string" in types:
            _check_string(schema, names, path)
        if "object" in types:
            self._check_object(schema, names, path, depth)
        if "array" in types:
            self._check_array(schema, path, depth)

    def _check_object(self, schema: Mapping[str, Any], names: set[str], path: str, depth: int) -> None:
        properties = schema.get("properties", {})
        self._check_each(properties, f"{path}/properties", depth)
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise _refusal(f"{path}/required", f"must be a list of names, got {_short(required)}")
        for name in required:
            if not isinstance(name, str) or name not in properties:
                raise _refusal(f"{path}/required", f"{_short(name)} is not declared; put it into properties")
        openers = names & {
            "patternProperties",
            "propertyNames",
            "additionalProperties",
            "unevaluatedProperties",
        }
        openers -= {name for name in openers if schema[name] is False}
        for name in sorted(openers & {"additionalProperties", "unevaluatedProperties"}):
            self.check(schema[name], f"{path}/{name}", depth + 1)
        if "propertyNames" in names:
            _refuse_beside("propertyNames", names & {"properties", "patternProperties"}, path)
            self.check(schema["propertyNames"], f"{path}/propertyNames", depth + 1, "string")
        if "patternProperties" in names:
            others = {"properties", "additionalProperties", "unevaluatedProperties"}
            _refuse_beside("patternProperties", openers & others | names & {"properties"}, path)
            self._check_patterns(schema["patternProperties"], f"{path}/patternProperties", depth)
        if openers and schema.get("minProperties", 0) > 1:
            # A name that is repeated counts once.
            raise _refusal(
                path, f"minProperties above 1 beside {min(openers)} is not supported; use required"
            )

    def _check_patterns(self, patterns: object, path: str, depth: int) -> None:
        self._check_each(patterns, path, depth)
        assert isinstance(patterns, Mapping)
        if len(patterns) != 1:
            raise _refusal(path, f"one pattern is supported, got {len(patterns)}")
        check_regex(next(iter(patterns)), f"structured_outputs.json at {path}", in_json=True)

    def _check_array(self, schema: Mapping[str, Any], path: str, depth: int) -> None:
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise _refusal(f"{path}/prefixItems", f"must be a list of schemas, got {_short(prefix)}")
        for index, each in enumerate(prefix):
            self.check(each, f"{path}/prefixItems/{index}", depth + 1)
        for name in ("items", "unevaluatedItems"):
            self.check(schema.get(name, True), f"{path}/{name}", depth + 1)

    def _check_each(self, schemas: object, path: str, depth: int) -> None:
        if not isinstance(schemas, Mapping):
            raise _refusal(path, f"must be an object of schemas, got {_short(schemas)}")
        for name, each in schemas.items():
            self.check(each, f"{path}/{name}", depth + 1)


def _check_string(schema: Mapping[str, Any], names: set[str], path: str) -> None:
    for name, others in (("pattern", {"format", *_LENGTHS}), ("format", _LENGTHS)):
        if name in names:
            _refuse_beside(name, names & others, path)
    if "format" in names and str(schema["format"]) not in _FORMATS:
        raise _refusal(path, f"format {_short(schema['format'])} is not supported; it has {sorted(_FORMATS)}")
    if "pattern" in names:
        if not isinstance(schema["pattern"], str):
            raise _refusal(path, f"pattern must be a string, got {_short(schema['pattern'])}")
        check_regex(schema["pattern"], f"structured_outputs.json at {path}/pattern", in_json=True)


def _check_counts(schema: Mapping[str, Any], path: str) -> None:
    for name in sorted(_COUNTS & set(schema)):
        value = schema[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _refusal(f"{path}/{name}", f"must be a whole number from 0, got {_short(value)}")


def _check_values(schema: Mapping[str, Any], path: str) -> None:
    """Values of enum or const beside a type: the compiler takes them whatever their type is."""
    values = schema.get("enum", [schema.get("const")])
    if not isinstance(values, list) or not values:
        raise _refusal(f"{path}/enum", f"must be a list that is not empty, got {_short(values)}")
    if "enum" in schema and "const" in schema and values != [schema["const"]]:
        raise _refusal(path, "enum beside another const is not supported; keep one of them")
    types = schema.get("type", list(_PYTHON_TYPES))
    types = [types] if isinstance(types, str) else types
    for value in values:
        if not any(_is_of_type(value, each) for each in types):
            raise _refusal(
                path, f"value {_short(value)} is not of type {' or '.join(map(str, types))}; remove it"
            )


def _is_of_type(value: object, name: object) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _PYTHON_TYPES.get(str(name), ()))


def _implied_type(names: set[str]) -> str | None:
    return "object" if "properties" in names else "array" if "items" in names else None


def _refuse_beside(name: str, others: set[str], path: str) -> None:
    if others:
        raise _refusal(path, f"{min(others)} beside {name} is not supported, it would be ignored")


def _refusal(path: str, reason: str) -> ConfigError:
    shown = path if len(path) <= 200 else path[:100] + "..." + path[-97:]
    return ConfigError(f"structured_outputs.json at {shown or '/'}: {reason}")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
