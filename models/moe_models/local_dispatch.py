"""LocalDispatcher: the TokenDispatcher of a rank that works alone."""

from __future__ import annotations

import torch

from moe_models.interfaces import Dispatched, ExpertShard


class LocalDispatcher:
    """Keeps tokens where they are and says which of their experts `shard` holds.

    With a shard of some experts, `combine` returns that shard's partial sums alone.
    """

    def __init__(self, shard: ExpertShard, device: str | torch.device = "cpu") -> None:
        local_of_E = torch.full((shard.num_experts,), -1, dtype=torch.int64, device=device)
        logical_L = torch.tensor(shard.local_experts, dtype=torch.int64, device=device)
        local_of_E[logical_L] = torch.arange(len(shard.local_experts), device=device)
        self._local_of_E = local_of_E

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """The same rows, G = T, with local ids."""
        local_ids_TK = self._local_of_E[topk_ids_TK]
        return Dispatched(x_GH=x_TH, local_ids_GK=local_ids_TK, weights_GK=topk_weights_TK, handle=None)

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """The rows as they are: there is no other rank to sum over."""
        return y_GH
