"""Figures that benchmarks have written."""

from __future__ import annotations

import re
from pathlib import Path


def read_figure(prefix: Path) -> set[str]:
    """Both files are there and nothing else is; returns the texts that the SVG shows."""
    files = {file.name for file in prefix.parent.iterdir()}
    assert files == {f"{prefix.name}.png", f"{prefix.name}.svg"}
    assert prefix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # matplotlib draws letters as paths, and names each text in a comment.
    return set(re.findall(r"<!-- (.*?) -->", prefix.with_suffix(".svg").read_text()))
