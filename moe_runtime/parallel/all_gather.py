"""Dispatch by all-gather, combine by reduce-scatter: every token visits every rank, at fixed shapes.

Nothing is decided on the host, so on GPUs a step needs no synchronisation. With few ranks, or many experts a
token, nearly every rank needs every token anyway.

Shape legend: T tokens of this rank, P most tokens of any rank, W ranks, H hidden, K top-k, E logical experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_models.interfaces import Dispatched, TokenDispatcher
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.groups import ProcessGroups, collective
from moe_runtime.parallel.packing import TokenPacking
from moe_runtime.parallel.traffic import Traffic


class AllGatherDispatcher:
    """Holds what stays the same between steps."""

    def __init__(self, groups: ProcessGroups, placement: ExpertPlacement, device: torch.device) -> None:
        self.groups = groups
        self.traffic = Traffic()
        # Id of each logical expert here, -1 where it lives elsewhere; one entry more, for padding (id -1).
        self.local_id_E1 = torch.full((placement.num_experts + 1,), -1, dtype=torch.int64, device=device)
        mine = torch.tensor(placement.experts_of_rank[groups.rank], dtype=torch.int64, device=device)
        self.local_id_E1[mine] = torch.arange(len(mine), device=device)

    def for_step(self, token_counts: tuple[int, ...]) -> TokenDispatcher:
        return _AllGatherStep(self, max(token_counts))


class _AllGatherStep:
    def __init__(self, shared: AllGatherDispatcher, padded: int) -> None:
        self._shared = shared
        self._groups = shared.groups
        self._padded = padded  # P

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        packing = TokenPacking(x_TH.shape[1], topk_ids_TK.shape[1], x_TH.dtype)
        mine = packing.pack(x_TH, topk_ids_TK, topk_weights_TK, self._padded)
        everyone = torch.empty(
            (self._groups.size * self._padded, packing.row_bytes), dtype=torch.uint8, device=x_TH.device
        )
        with collective("gathering tokens"):
            dist.all_gather_single(everyone, mine, group=self._groups.data)
        self._shared.traffic.dispatch += (self._groups.size - 1) * mine.nbytes
        x, ids, weights = packing.views(everyone)
        return Dispatched(
            x_GH=x,
            local_ids_GK=self._shared.local_id_E1[ids.long()],
            weights_GK=weights,
            handle=x_TH.shape[0],
        )

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        size, padded, num_tokens = self._groups.size, self._padded, dispatched.handle
        self._shared.traffic.combine += (size - 1) * padded * y_GH.shape[1] * y_GH.itemsize
        if y_GH.device.type == "cuda":
            out = torch.empty((padded, y_GH.shape[1]), dtype=y_GH.dtype, device=y_GH.device)
            with collective("reducing partial sums"):
                dist.reduce_scatter_single(out, y_GH.contiguous(), group=self._groups.data)
            return out[:num_tokens]
        # gloo: exchange and add in rank order, in float32, so that a sum does not depend on the algorithm.
        parts = torch.empty_like(y_GH, memory_format=torch.contiguous_format)
        with collective("exchanging partial sums"):
            dist.all_to_all_single(parts, y_GH.contiguous(), group=self._groups.data)
        per_rank = parts.view(size, padded, -1)[:, :num_tokens]
        return per_rank.sum(0, dtype=torch.float32).to(y_GH.dtype)
