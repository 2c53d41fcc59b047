"""Drawing a token from unnormalised probabilities and a uniform number: the inverse of their running sum."""

from __future__ import annotations

import torch
from torch.nn import functional

_SPAN = 512  # tokens summed as one in the first of two searches


def draw_tokens(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """First token, in vocabulary order, whose running sum of weights exceeds `uniform * total`; int64 [R].

    weights_RV are float32, not negative, with a positive sum; sums are float64. The sums of spans are
    searched first and then the span itself, so that the running sum over a whole row is never stored. A
    token of weight 0 is never drawn.
    """
    num_rows, vocab = weights_RV.shape
    padded = functional.pad(weights_RV, (0, -vocab % _SPAN)).view(num_rows, -1, _SPAN)
    span_ends_RS = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target_R1 = uniform_R[:, None] * span_ends_RS[:, -1:]
    span_R1 = _first_above(span_ends_RS, target_R1)
    before_R1 = torch.where(span_R1 > 0, span_ends_RS.gather(1, (span_R1 - 1).clamp_min(0)), 0.0)
    in_span_RC = padded[torch.arange(num_rows, device=span_R1.device), span_R1[:, 0]]
    ends_RC = in_span_RC.cumsum(-1, dtype=torch.float64)
    return (span_R1 * _SPAN + _first_above(ends_RC, target_R1 - before_R1))[:, 0]


def _first_above(ends_RS: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """Index of the first of the rising `ends` above the target, [R, 1]; rounding cannot pass the last."""
    below_last_R1 = torch.nextafter(ends_RS[:, -1:], torch.zeros_like(target_R1))
    found_R1 = torch.searchsorted(ends_RS, torch.minimum(target_R1, below_last_R1), right=True)
    # Only NaN, which the caller reports, gets past the last; it must not index outside.
    return found_R1.clamp_max(ends_RS.shape[1] - 1)
