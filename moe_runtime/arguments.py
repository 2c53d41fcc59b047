"""Checked keyword arguments of the dataclasses that users make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from moe_runtime.errors import refuse_unknown

_Class = TypeVar("_Class", bound=type)


def refuse_unknown_arguments(cls: _Class) -> _Class:
    """Class decorator for dataclasses: an unknown keyword raises ConfigError with its nearest match."""
    generated: Callable[..., None] = getattr(cls, "__init__")  # noqa: B009 - mypy distrusts cls.__init__
    names = [field.name for field in dataclasses.fields(cls) if field.init]

    @functools.wraps(generated)
    def __init__(self: Any, **arguments: Any) -> None:  # noqa: N807 - it replaces the generated method
        refuse_unknown(arguments, names, cls.__name__)
        generated(self, **arguments)

    setattr(cls, "__init__", __init__)  # noqa: B010 - the same
    return cls
