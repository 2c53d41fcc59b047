"""Making the dispatcher of a rank, and counting the load that it sees.

Shape legend: T tokens of this rank, G tokens after dispatch, H hidden, K top-k, E logical experts, L local
experts, W ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch

from moe_models.interfaces import Dispatched, ExpertShard, OneCall, TokenDispatcher, one_call_of
from moe_models.local_dispatch import LocalDispatcher
from moe_runtime.errors import ConfigError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.all_gather import AllGatherDispatcher
from moe_runtime.parallel.all_to_all import AllToAllDispatcher
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.groups import ProcessGroups
from moe_runtime.parallel.shared_memory import SharedMemoryDispatcher
from moe_runtime.parallel.traffic import Traffic

# Above this share of the ranks touched by an average token, copying every token everywhere costs less than
# asking which rank needs which: an all-to-all has to exchange its counts first.
_ALL_GATHER_FROM_SHARE = 0.75


class Dispatchers(Protocol):
    """Makes the dispatcher of each step."""

    def for_step(self, token_counts: tuple[int, ...]) -> TokenDispatcher:
        """`token_counts` are the tokens of every rank in this step, as agreed."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent so far."""
        ...


class LocalDispatchers:
    """One rank that holds every expert: nothing travels."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        self._dispatcher = LocalDispatcher(ExpertShard.whole(placement.num_experts), device)

    def for_step(self, token_counts: tuple[int, ...]) -> TokenDispatcher:
        return self._dispatcher

    @property
    def traffic(self) -> Traffic:
        return Traffic()


def make_dispatchers(
    kind: str,
    groups: ProcessGroups | None,
    placement: ExpertPlacement,
    capacity: StepCapacity,
    device: torch.device,
) -> tuple[Dispatchers, str]:
    """The dispatchers of this rank and one sentence that says why they were chosen.

    Raises:
        ConfigError: `kind` cannot be had here, or there is no memory for its buffers.
    """
    if groups is None:
        return LocalDispatchers(placement, device), "local: one rank holds every expert"
    if kind == "auto":
        kind, reason = _choose(placement.num_ranks, capacity.top_k, device, groups.host is not None)
    else:
        reason = "as configured"
    if kind == "shared_memory":
        if groups.host is None or device.type != "cpu":
            raise ConfigError(
                "dispatcher='shared_memory' needs CPU ranks that are all on one node, and a C compiler there; "
                "use dispatcher='auto'"
            )
        shared = SharedMemoryDispatcher(groups.host, placement, capacity)
        return shared, f"{kind}: {reason}; {shared.num_bytes / 1e6:.0f} MB of buffers for all ranks"
    made = (AllGatherDispatcher if kind == "all_gather" else AllToAllDispatcher)(groups, placement, device)
    return made, f"{kind}: {reason}"


def _choose(num_ranks: int, top_k: int, device: torch.device, share_memory: bool) -> tuple[str, str]:
    if device.type == "cuda":
        return "all_gather", "fixed shapes, so that a step needs no host synchronisation"
    if share_memory:
        return "shared_memory", f"the {num_ranks} ranks are on one host"
    share = 1 - (1 - 1 / num_ranks) ** top_k
    words = f"a token's {top_k} experts touch {share:.0%} of {num_ranks} ranks"
    return ("all_gather" if share >= _ALL_GATHER_FROM_SHARE else "all_to_all"), words


class ExpertLoad:
    """Counts, on the device, the tokens that each local expert of each MoE layer computed."""

    def __init__(self, num_moe_layers: int, num_local_experts: int, device: torch.device) -> None:
        # One column more than experts: choices that live elsewhere (-1) fall into the last.
        self._counts = torch.zeros((num_moe_layers, num_local_experts + 1), dtype=torch.int64, device=device)

    def watch(self, dispatcher: TokenDispatcher) -> TokenDispatcher:
        """The same dispatcher for one step, counted: its n-th dispatch is the n-th MoE layer's."""
        return _CountingDispatcher(dispatcher, self._counts)

    def tokens_per_expert(self) -> torch.Tensor:
        """Counts so far, [MoE layers, L], on the host."""
        return self._counts[:, :-1].cpu()


class _CountingDispatcher:
    def __init__(self, inner: TokenDispatcher, counts: torch.Tensor) -> None:
        self._inner = inner
        self._counts = counts
        self._layer = 0

    @property
    def one_call(self) -> OneCall | None:
        """See `one_call_of`."""
        inner = one_call_of(self._inner)
        return None if inner is None else OneCall(exchange=inner.exchange, record=self._record)

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        dispatched = self._inner.dispatch(x_TH, topk_ids_TK, topk_weights_TK)
        ids = dispatched.local_ids_GK.reshape(-1)
        row = self._counts[self._layer]
        _count(row[None], ids[None])
        self._layer += 1
        return dispatched

    def _record(self, ids_MGK: torch.Tensor) -> None:
        _count(self._counts, ids_MGK.flatten(1))

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return self._inner.combine(y_GH, dispatched)


def _count(counts: torch.Tensor, ids: torch.Tensor) -> None:
    """Add each layer's choices to its row of counts, those of nobody here to the last column."""
    columns = torch.where(ids < 0, counts.shape[1] - 1, ids)
    counts.scatter_add_(1, columns, torch.ones_like(columns))
