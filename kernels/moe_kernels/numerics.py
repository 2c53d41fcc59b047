"""The one rule of precision that the references share."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of `dtype` are kept in: float64 for float64, float32 for anything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
