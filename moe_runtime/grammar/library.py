"""The xgrammar library, imported when the first structured request comes: it takes seconds."""

from __future__ import annotations

import importlib
import re
from typing import Any

from moe_runtime.errors import ConfigError

INSTALL_HINT = (
    "structured_outputs needs xgrammar, which is not installed; pip install 'moe-runtime[structured]'"
)

# "[12:34:56] /project/cpp/regex_converter.cc:83: " before what the library has to say.
_ORIGIN = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")


def load_xgrammar() -> Any:
    """The module; ConfigError with the way out where it is missing."""
    try:
        return importlib.import_module("xgrammar")
    except ImportError as error:
        if error.name != "xgrammar":
            raise ConfigError(f"xgrammar cannot be imported: {error}") from error
        raise ConfigError(INSTALL_HINT) from error


def readable(message: str) -> str:
    """The first line of a message of the library, without the place in its source."""
    line = next(iter(message.strip().splitlines()), "no reason given")
    line = _ORIGIN.sub("", line)
    return line if len(line) <= 300 else line[:297] + "..."
