"""RoutingTap: writes down which experts a rank's tokens choose, or makes them choose what a trace says.

It sits between the routers and the dispatcher, where every model's choices pass. While it does neither, a step's
dispatcher is the one that it would be without a tap.

Shape legend: T tokens of this rank, S tokens of a trace, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_models.interfaces import Dispatched, TokenDispatcher


class RoutingTap:
    """Belongs to the thread of the step loop."""

    def __init__(self, num_layers: int, top_k: int, device: torch.device) -> None:
        """
        Args:
            num_layers: MoE layers of the model.
        """
        self._device = device
        self._empty = np.zeros((0, top_k), dtype=np.int16)
        self._num_layers = num_layers
        self._recorded: list[list[torch.Tensor]] | None = None  # int16 [T, K] of each step, by layer
        self._forced_SK: list[torch.Tensor] | None = None  # int64, by layer
        self._next_row = 0  # of the trace, for the next token

    def watch(self, dispatcher: TokenDispatcher) -> TokenDispatcher:
        """The dispatcher of one step; its n-th dispatch is the n-th MoE layer's."""
        if self._recorded is None and self._forced_SK is None:
            return dispatcher
        return _TappedDispatcher(dispatcher, self)

    def record(self, on: bool) -> None:
        """Begin to write choices down, with none so far, or end."""
        self._recorded = [[] for _ in range(self._num_layers)] if on else None

    def take(self) -> list[np.ndarray]:
        """What was written down since the last call, int16 [T, K] by layer, in the order of computation."""
        assert self._recorded is not None, "nothing is recorded"
        taken = [torch.cat(steps).cpu().numpy() if steps else self._empty for steps in self._recorded]
        self.record(True)
        return taken

    def replay(self, choices_SK: Sequence[np.ndarray] | None, first: int = 0) -> None:
        """Have tokens choose the rows of a trace in turn, with equal weights; None: what routers choose.

        Args:
            choices_SK: logical expert ids of each layer; after the last row comes the first.
            first: row of the next token.
        """
        self._forced_SK = None
        if choices_SK is not None:
            # A copy: what comes through Ray's object store cannot be written to, which torch warns of.
            self._forced_SK = [torch.from_numpy(c.astype(np.int64)).to(self._device) for c in choices_SK]
            self._next_row = first % len(choices_SK[0])

    def pass_layer(self, layer: int, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """The choices of a layer's tokens, int64 [T, K]: as they are, or as forced."""
        num_tokens = topk_ids_TK.shape[0]
        if self._forced_SK is not None:
            forced_SK = self._forced_SK[layer]
            topk_ids_TK = _rows(forced_SK, self._next_row, num_tokens)
            if layer == self._num_layers - 1:
                self._next_row = (self._next_row + num_tokens) % len(forced_SK)
        if self._recorded is not None and num_tokens:
            self._recorded[layer].append(topk_ids_TK.to(torch.int16))
        return topk_ids_TK

    @property
    def forces(self) -> bool:
        """Whether choices come from a trace."""
        return self._forced_SK is not None


class _TappedDispatcher:
    def __init__(self, inner: TokenDispatcher, tap: RoutingTap) -> None:
        self._inner = inner
        self._tap = tap
        self._layer = 0

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        topk_ids_TK = self._tap.pass_layer(self._layer, topk_ids_TK)
        if self._tap.forces:
            # The routers' weights belong to other experts.
            topk_weights_TK = torch.full_like(topk_weights_TK, 1 / topk_weights_TK.shape[1])
        self._layer += 1
        return self._inner.dispatch(x_TH, topk_ids_TK, topk_weights_TK)

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return self._inner.combine(y_GH, dispatched)


def _rows(trace_SK: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """`count` rows from `first` on, around the end."""
    if first + count <= len(trace_SK):
        return trace_SK[first : first + count]
    return trace_SK[torch.arange(first, first + count, device=trace_SK.device) % len(trace_SK)]
