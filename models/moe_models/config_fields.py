"""Reading fields of a parsed `config.json`; an error names the key, the value seen and the value wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def wrong(key: str, seen: object, wanted: str) -> ValueError:
    """The error for a value that cannot be used."""
    return ValueError(f"config.json: {key} is {seen!r}; wanted {wanted}")


def integer(config: Config, key: str, default: int, *, minimum: int = 1) -> int:
    """An integer of at least `minimum`; `default` where the key is absent."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise wrong(key, value, f"an integer of at least {minimum}")
    return value


def positive_number(config: Config, key: str, default: float, *, prefix: str = "") -> float:
    """A finite number above 0; `prefix` is where `config` itself stands in the file, for the message."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise wrong(prefix + key, value, "a number above 0")
    return float(value)


def boolean(config: Config, key: str, default: bool) -> bool:
    """true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise wrong(key, value, "true or false")
    return value


def mapping(config: Config, key: str) -> Config:
    """An object; empty where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(key, value, "an object")
    return value


def require_multiple(larger: str, larger_value: int, smaller: str, smaller_value: int) -> None:
    """Raise unless `larger_value` is a multiple of `smaller_value`; both names go into the message."""
    if larger_value % smaller_value:
        raise wrong(larger, larger_value, f"a multiple of {smaller} ({smaller_value})")
