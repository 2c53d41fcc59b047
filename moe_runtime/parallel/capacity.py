"""What the dispatchers' buffers must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCapacity:
    """The largest step of a rank, and the size of its tokens."""

    max_tokens: int  # of one rank in one step
    hidden_size: int
    top_k: int
    dtype: torch.dtype  # of activations
