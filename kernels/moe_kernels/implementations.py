"""Looking an implementation of an operation up by the name that a KernelPlan gives it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any


def find_implementation(operation: str, table: Mapping[str, str], name: str) -> Callable[..., Any]:
    """The function that `table` ("module:function" by name) has for `name`, imported on first use.

    A name may carry an instruction set, as in "cpu:avx2": the function is given it as `isa`.

    Raises ValueError that names the operation and what it has.
    """
    base, _, isa = name.partition(":")
    if base not in table:
        raise ValueError(f"{operation} has no implementation {name!r}; it has {sorted(table)}")
    return _imported(table[base], isa)


@functools.cache
def _imported(target: str, isa: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    found = getattr(importlib.import_module(module), function)
    return functools.partial(found, isa=isa) if isa else found
