"""Engine: the owner's side of one deployment. Starts its ranks, watches over them, ends them."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_runtime.cluster import GroupName, Placement, resolve_device
from moe_runtime.config import EngineConfig
from moe_runtime.errors import EngineDeadError, MoeRuntimeError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.rank_spec import RankReport, RankSpec, RankStats, StartUpStep
from moe_runtime.ranks import DEFAULT_WORKER, Ranks
from moe_runtime.registry import ModelTarget

logger = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 10.0
_RPC_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What a driver needs to talk to the ranks of a running deployment."""

    addresses: tuple[tuple[str, int], ...]  # of each rank's server
    key: bytes = dataclasses.field(repr=False)  # that both ends prove to know
    reports: tuple[RankReport, ...]

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together, on every rank."""
        return min(report.max_model_len for report in self.reports)


class Engine:
    """One deployment: its ranks serve until `shutdown`, or until one of them fails."""

    def __init__(
        self,
        files: ModelFiles,
        target: ModelTarget,
        placement: ExpertPlacement,
        config: EngineConfig,
        *,
        on_progress: Callable[[StartUpStep], None] | None = None,
        worker: str = DEFAULT_WORKER,
        name: str | None = None,
    ) -> None:
        """Start the ranks, join them, load the weights, start their loops; returns when all serve.

        Args:
            on_progress: called with what some rank has done since its last call, totals being those of all
                ranks together.
            worker: class that runs in the rank actors, `"module:Class"`.
            name: of the deployment, told to those who look at the cluster.
        """
        self._ranks: Ranks | None = None
        self._failure: MoeRuntimeError | None = None
        self._ended = threading.Event()
        device = resolve_device(config.device, config.placement_timeout_s)
        slots = Placement.reserve(
            placement.num_ranks,
            device,
            config.placement_timeout_s,
            config.placement_strategy,
            GroupName(name, files.name).encode(),
        )
        try:
            specs = rank_specs(slots, files, target, placement, dataclasses.replace(config, device=device))
            self._ranks = Ranks(slots, device, worker, specs)
            self.connection = self._start(self._ranks, on_progress)
        except BaseException:  # Ctrl-C during start-up too: leave nothing behind
            self.shutdown()
            slots.remove()
            raise
        threading.Thread(target=self._watch, args=(self._ranks,), name="engine-watch", daemon=True).start()
        for report in self.connection.reports:
            logger.info("%s", report)

    def wait_for_end(self) -> MoeRuntimeError | None:
        """Block until the deployment has ended; returns what ended it, None for `shutdown`."""
        self._ended.wait()
        return self._failure

    @property
    def ended(self) -> bool:
        """Whether the deployment has ended."""
        return self._ended.is_set()

    @property
    def failure(self) -> MoeRuntimeError | None:
        """What ended it, if it ended by itself."""
        return self._failure

    def stats(self) -> list[RankStats]:
        """What each rank has done and holds."""
        return self._alive().ask("stats", timeout_s=_STATS_TIMEOUT_S)

    def expert_load(self) -> list[list[list[int]]]:
        """For each rank, tokens that each local expert of each MoE layer computed: [layers][local experts]."""
        return self._alive().ask("expert_load", timeout_s=_STATS_TIMEOUT_S)

    def collective_rpc(self, method: str, *args: Any) -> list[Any]:
        """Results of a method of each rank's worker, run beside its steps, in rank order."""
        return self._alive().ask(method, *args, timeout_s=_RPC_TIMEOUT_S)

    def check_health(self, timeout_s: float = 10.0) -> None:
        """Raises RankFailedError or EngineDeadError unless every rank answers in time."""
        self._alive().ask("where", timeout_s=timeout_s)

    def shutdown(self) -> None:
        """End the ranks and free their resources; safe to call again."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.kill()
        self._ended.set()

    def _start(self, ranks: Ranks, on_progress: Callable[[StartUpStep], None] | None) -> Connection:
        ranks.locate()
        if len(ranks) > 1:
            ranks.call("join", ranks.call_one(0, "host_store"))
        for _, step in ranks.stream("load", [()] * len(ranks)):
            if on_progress:
                total = None if step.total is None else step.total * len(ranks)
                on_progress(dataclasses.replace(step, total=total))
        reports = tuple(ranks.call("report"))
        key = secrets.token_bytes(32)
        return Connection(addresses=tuple(ranks.call("open_server", key)), key=key, reports=reports)

    def _watch(self, ranks: Ranks) -> None:
        """Keep the ranks' loops running; when one fails, say why and end all."""
        addresses = self.connection.addresses
        peers = [(addresses[:rank] + addresses[rank + 1 :],) for rank in range(len(ranks))]
        try:
            ranks.call_each("serve", peers)
        except Exception as error:
            if self._ranks is not None:  # else `shutdown` is why
                self._failure = error if isinstance(error, MoeRuntimeError) else EngineDeadError(repr(error))
        self.shutdown()

    def _alive(self) -> Ranks:
        if self._ranks is None or self._ranks.ended:
            why = f": {self._failure}" if self._failure else ""
            raise EngineDeadError(f"the deployment has ended{why}; start a new one")
        return self._ranks


def rank_specs(
    slots: Placement,
    files: ModelFiles,
    target: ModelTarget,
    placement: ExpertPlacement,
    config: EngineConfig,
) -> list[RankSpec]:
    """What each rank of a deployment is told, in rank order."""
    nodes = [slot.node_id for slot in slots.slots]
    return [
        RankSpec(
            rank=rank,
            generation=0,
            config=config,
            model_files=files,
            target=target,
            placement=placement,
            ranks_on_node=nodes.count(node),
            index_on_node=nodes[:rank].count(node),
        )
        for rank, node in enumerate(nodes)
    ]
