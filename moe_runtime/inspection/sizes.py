"""Byte counts as people write and read them: `80GB` to 80000000000 and back."""

from __future__ import annotations

import re

from moe_runtime.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of `"80GB"`, `"80GiB"`, `"500MB"`, `"1.5T"` or a bare number.

    Raises ConfigError, naming `what`, for anything else and for nothing at all (0 bytes).
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError(
            f"{what} must be a number of bytes with a unit, such as 80GB, 80GiB or 500MB, got {text!r}"
        )
    return size


def format_size(num_bytes: float) -> str:
    """`"79.7 GB"`: decimal units, three digits or so."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def format_count(number: int) -> str:
    """`"79.67 B"` for parameters, `"1.2 M"`, or the number itself below a million."""
    for scale, unit in ((10**9, "B"), (10**6, "M")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:,}"
