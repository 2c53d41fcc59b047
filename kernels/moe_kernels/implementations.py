"""Looking an implementation of an operation up by the name that a KernelPlan gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def find_implementation(operation: str, table: Mapping[str, T], name: str) -> T:
    """`table[name]`, or a ValueError that names the operation and what it has."""
    if name not in table:
        raise ValueError(f"{operation} has no implementation {name!r}; it has {sorted(table)}")
    return table[name]
