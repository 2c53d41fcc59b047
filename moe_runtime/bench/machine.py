"""What this machine's processor is. Asks the system's files alone: clients that measure servers have no torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
LAST_LEVEL = "cache/index3"  # of a core
_FACTS = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """Name, family and model: a virtual machine's name says less than these."""
    if not _FACTS.exists():
        return platform.processor() or platform.machine()
    first = _FACTS.read_text().split("\n\n")[0]
    facts = dict(re.findall(r"^(.*?)\s*: (.*)$", first, re.MULTILINE))
    name = facts.get("model name", platform.machine())
    return f"{name}, family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else name


def last_level_cache() -> str | None:
    """Size of the last-level cache that a core can use, as "32768K"; None where the system does not say."""
    size = CPUS / "cpu0" / LAST_LEVEL / "size"
    return size.read_text().strip() if size.exists() else None
