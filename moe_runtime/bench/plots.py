"""Figures of results, as PNG and SVG. matplotlib is an extra, and nothing but this needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def check_plottable(prefix: str | None) -> None:
    """Refuse a `--plot` that cannot be drawn, before minutes are spent on what it shows.

    Raises:
        ConfigError: matplotlib is not installed, or the directory of `prefix` does not exist.
    """
    if prefix is None:
        return
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; pip install 'moe-runtime[plot]'") from error
    if not Path(prefix).absolute().parent.is_dir():
        raise ConfigError(f"--plot {prefix}: give a prefix in a directory that exists")


def new_figure(width: float = 8.0, height: float = 4.5) -> Figure:
    """An empty figure, in inches, that needs no display and no global state of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, prefix: str) -> list[Path]:
    """Write PREFIX.png and PREFIX.svg; returns them. The same figure gives the same SVG."""
    import matplotlib

    paths = [Path(f"{prefix}.{kind}") for kind in FORMATS]
    with matplotlib.rc_context({"svg.hashsalt": "moe_runtime"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
