"""LocalDispatcher: the TokenDispatcher of a rank that works alone."""

from __future__ import annotations

import torch

from moe_models.interfaces import Dispatched, ExpertShard, OneCall


class LocalDispatcher:
    """Keeps tokens where they are and says which of their experts `shard` holds.

    With a shard of some experts, `combine` returns that shard's partial sums alone.
    """

    def __init__(self, shard: ExpertShard, device: str | torch.device = "cpu") -> None:
        local_of = [-1] * shard.num_experts
        for local, logical in enumerate(shard.local_experts):
            local_of[logical] = local
        self._local_of_E = torch.tensor(local_of, dtype=torch.int64, device=device)
        self._in_order = local_of == list(range(shard.num_experts))  # then ids are local ids

    @property
    def one_call(self) -> OneCall | None:
        """See `one_call_of`."""
        return OneCall() if self._in_order else None

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """The same rows, G = T, with local ids."""
        local_ids_TK = topk_ids_TK if self._in_order else self._local_of_E[topk_ids_TK]
        return Dispatched(x_GH=x_TH, local_ids_GK=local_ids_TK, weights_GK=topk_weights_TK, handle=None)

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """The rows as they are: there is no other rank to sum over."""
        return y_GH
