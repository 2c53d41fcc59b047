"""TimedDispatcher: tells a timer when tokens travel, and when the experts compute in between.

Shape legend: T tokens of this rank, G tokens after dispatch, H hidden, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_models.interfaces import Dispatched, TokenDispatcher
from moe_runtime.timing.parts import Part
from moe_runtime.timing.timer import PartTimer


class TimedDispatcher:
    """The dispatcher of one step, watched."""

    def __init__(self, inner: TokenDispatcher, timer: PartTimer[Any]) -> None:
        self._inner = inner
        self._switch = timer.switch

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """See TokenDispatcher; what follows until `combine` is the experts' time."""
        self._switch(Part.DISPATCH)
        dispatched = self._inner.dispatch(x_TH, topk_ids_TK, topk_weights_TK)
        self._switch(Part.EXPERTS)
        return dispatched

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See TokenDispatcher."""
        self._switch(Part.COMBINE)
        out_TH = self._inner.combine(y_GH, dispatched)
        self._switch(Part.OTHER)
        return out_TH
