"""Engine: the driver's side of one deployment. Starts the ranks, spreads requests over them, gathers tokens."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_runtime.cluster import Placement, resolve_device
from moe_runtime.config import EngineConfig
from moe_runtime.errors import EngineDeadError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.rank_spec import RankReport, RankSpec
from moe_runtime.ranks import DEFAULT_WORKER, Ranks
from moe_runtime.registry import ModelTarget
from moe_runtime.request import EngineRequest, OutputDelta

logger = logging.getLogger(__name__)


class Engine:
    """One deployment: its ranks live until `shutdown`, or until one of them fails."""

    def __init__(
        self,
        files: ModelFiles,
        target: ModelTarget,
        placement: ExpertPlacement,
        config: EngineConfig,
        *,
        on_loaded_bytes: Callable[[int], None] | None = None,
        worker: str = DEFAULT_WORKER,
    ) -> None:
        """Start the ranks, join them and load the weights; returns when all are ready.

        Args:
            on_loaded_bytes: called with the number of checkpoint bytes that some rank has read since its
                last call.
            worker: class that runs in the rank actors, `"module:Class"`.
        """
        self._ranks: Ranks | None = None
        self._batches = itertools.count(1)
        device = resolve_device(config.device)
        slots = Placement.reserve(
            placement.num_ranks, device, config.placement_timeout_s, config.placement_strategy
        )
        try:
            nodes = [slot.node_id for slot in slots.slots]
            specs = [
                RankSpec(
                    rank=rank,
                    config=dataclasses.replace(config, device=device),
                    model_files=files,
                    target=target,
                    placement=placement,
                    ranks_on_node=nodes.count(node),
                )
                for rank, node in enumerate(nodes)
            ]
            self._ranks = Ranks(slots, device, worker, specs)
            self._ranks.locate()
            if len(self._ranks) > 1:
                meeting_point = self._ranks.call_one(0, "host_store")
                self._ranks.call("join", meeting_point)
            for _, num_bytes in self._ranks.stream("load", [()] * len(self._ranks)):
                if on_loaded_bytes:
                    on_loaded_bytes(num_bytes)
            self.reports: list[RankReport] = self._ranks.call("report")
        except BaseException:  # Ctrl-C during start-up too: leave nothing behind
            self.shutdown()
            slots.remove()
            raise
        for report in self.reports:
            logger.info("%s", report)

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together, on every rank."""
        return min(report.max_model_len for report in self.reports)

    def run(self, requests: Sequence[EngineRequest]) -> Iterator[OutputDelta]:
        """Serve `requests`; yields pieces of output as ranks deliver them.

        Raises:
            RankFailedError: a rank failed; all ranks have been ended.
            EngineDeadError: the deployment had ended before.
        """
        ranks = self._alive()
        batch = next(self._batches)
        shares = _spread(requests, len(ranks))
        try:
            for _, deltas in ranks.stream("generate", [(batch, share) for share in shares]):
                yield from deltas
        except BaseException:  # the caller left (Ctrl-C, a break out of the loop): the ranks live on
            if not ranks.ended:
                ranks.interrupt("abort", batch)
            raise

    def expert_load(self) -> list[Any]:
        """For each rank, tokens that each local expert of each MoE layer computed: [layers][local experts]."""
        return self._alive().call("expert_load")

    def shutdown(self) -> None:
        """End the ranks and free their resources; safe to call again."""
        if self._ranks is not None:
            self._ranks.kill()
            self._ranks = None

    def _alive(self) -> Ranks:
        if self._ranks is None or self._ranks.ended:
            raise EngineDeadError(
                "the deployment has ended: it was shut down or a rank failed; start a new one"
            )
        return self._ranks


def _spread(requests: Sequence[EngineRequest], num_ranks: int) -> list[list[EngineRequest]]:
    """Give each request, in order, to the rank with the fewest tokens to compute so far."""
    shares: list[list[EngineRequest]] = [[] for _ in range(num_ranks)]
    load = [(0, rank) for rank in range(num_ranks)]
    for request in requests:
        tokens, rank = heapq.heappop(load)
        shares[rank].append(request)
        tokens += len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        heapq.heappush(load, (tokens, rank))
    return shares
