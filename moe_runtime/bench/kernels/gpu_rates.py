"""What a time on a GPU means: rates, and the share of the roofline, as fields of a result and cells of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_kernels.aot.roofline import Peak, Work, roofline_seconds

RATE_COLUMNS = ("us", "TB/s", "TFLOP/s", "roofline us", "share")


def rates(seconds: float, work: Work, peak: Peak | None, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of a result; those of the roofline are None where the GPU's is not known."""
    least = None if peak is None else roofline_seconds(work, peak, dtype)
    return {
        "us": round(1e6 * seconds, 2),
        "tb_per_s": round(work.num_bytes / seconds / 1e12, 3),
        "tflop_per_s": round(work.flops / seconds / 1e12, 2),
        "roofline_us": None if least is None else round(1e6 * least, 2),
        "share": None if least is None else round(least / seconds, 3),
    }


def rate_cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    """The same below RATE_COLUMNS."""
    return (
        f"{result['us']:,.1f}",
        f"{result['tb_per_s']:.2f}",
        f"{result['tflop_per_s']:.1f}",
        "-" if result["roofline_us"] is None else f"{result['roofline_us']:,.1f}",
        "-" if result["share"] is None else f"{100 * result['share']:.0f}%",
    )


def limits_text(peak: Peak | None) -> str:
    """For a table's title."""
    return "" if peak is None else f"; {peak.name}: {peak.bytes_per_s / 1e12:g} TB/s"
