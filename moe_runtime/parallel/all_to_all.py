"""Dispatch by uneven all-to-all: a token crosses once to each rank that holds some of its experts.

Shape legend: T tokens of this rank, S (token, rank) pairs sent, G tokens received, W ranks, H hidden, K top-k,
E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_models.interfaces import Dispatched, TokenDispatcher
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.groups import ProcessGroups, collective
from moe_runtime.parallel.packing import TokenPacking
from moe_runtime.parallel.traffic import Traffic


@dataclass(frozen=True, slots=True)
class _Sent:
    """What `combine` must know of a dispatch."""

    num_tokens: int
    token_of_pair_S: torch.Tensor  # sorted by rank, then by token
    send_counts: list[int]  # pairs for each rank
    receive_counts: list[int]  # tokens from each rank


class AllToAllDispatcher:
    """Split lists are made on the host (a synchronisation on GPUs): for gloo, and for large prefills."""

    def __init__(self, groups: ProcessGroups, placement: ExpertPlacement, device: torch.device) -> None:
        self._groups = groups
        self.traffic = Traffic()
        self._rank_of_E = torch.tensor(placement.rank_of_expert(), dtype=torch.int64, device=device)
        self._local_id_E = torch.full((placement.num_experts,), -1, dtype=torch.int64, device=device)
        mine = torch.tensor(placement.experts_of_rank[groups.rank], dtype=torch.int64, device=device)
        self._local_id_E[mine] = torch.arange(len(mine), device=device)

    def for_step(self, token_counts: tuple[int, ...]) -> TokenDispatcher:
        return self

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        num_tokens = x_TH.shape[0]
        goes_TW = torch.zeros((num_tokens, self._groups.size), dtype=torch.bool, device=x_TH.device)
        goes_TW.scatter_(1, self._rank_of_E[topk_ids_TK], True)
        token_of_pair_S = goes_TW.T.nonzero()[:, 1]
        send_counts = goes_TW.sum(0)
        receive_counts = torch.empty_like(send_counts)
        with collective("exchanging token counts"):
            dist.all_to_all_single(receive_counts, send_counts, group=self._groups.data)
        sent = _Sent(num_tokens, token_of_pair_S, send_counts.tolist(), receive_counts.tolist())

        packing = TokenPacking(x_TH.shape[1], topk_ids_TK.shape[1], x_TH.dtype)
        packed = packing.pack(x_TH, topk_ids_TK, topk_weights_TK, num_tokens)[token_of_pair_S]
        self.traffic.dispatch += self._num_to_others(sent.send_counts) * packing.row_bytes
        self.traffic.dispatch += (self._groups.size - 1) * send_counts.itemsize
        received = self._exchange(packed, sent.send_counts, sent.receive_counts, "dispatching tokens")
        x, ids, weights = packing.views(received)
        return Dispatched(x_GH=x, local_ids_GK=self._local_id_E[ids.long()], weights_GK=weights, handle=sent)

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        sent: _Sent = dispatched.handle
        self.traffic.combine += self._num_to_others(sent.receive_counts) * y_GH.shape[1] * y_GH.itemsize
        partial_SH = self._exchange(
            y_GH.contiguous(), sent.receive_counts, sent.send_counts, "combining partial sums"
        )
        out = torch.zeros((sent.num_tokens, y_GH.shape[1]), dtype=torch.float32, device=y_GH.device)
        start = 0
        # A rank at a time, in order: within one rank's part a token stands once, so sums are deterministic.
        for count in sent.send_counts:
            part = slice(start, start + count)
            out.index_add_(0, sent.token_of_pair_S[part], partial_SH[part].float())
            start += count
        return out.to(y_GH.dtype)

    def _num_to_others(self, counts: list[int]) -> int:
        return sum(counts) - counts[self._groups.rank]

    def _exchange(
        self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int], what: str
    ) -> torch.Tensor:
        received = rows.new_empty((sum(receive_counts), rows.shape[1]))
        with collective(what):
            dist.all_to_all_single(received, rows, receive_counts, send_counts, group=self._groups.data)
        return received
