"""DeploymentMetrics: all that a server shows of one deployment, with a registry of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from moe_runtime import __version__
from moe_runtime.deployment import Deployment
from moe_runtime.metrics.activity_log import ActivityLog
from moe_runtime.metrics.history import LoadHistory
from moe_runtime.metrics.ranks import RankCollector
from moe_runtime.metrics.ray_bridge import RayBridge
from moe_runtime.metrics.requests import RequestRecorder
from moe_runtime.metrics.samples import RankSampler
from moe_runtime.rank_spec import RankReport, RankStats

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class DeploymentMetrics:
    """Several may live in one process. `render` and `load_snapshot` may wait for the ranks: not in an event loop.

    Give `observer` to whatever submits the requests (`AsyncLLM.observe`).
    """

    def __init__(
        self,
        ask: Callable[[], Sequence[RankStats]],
        *,
        model_name: str,
        deployment_info: Mapping[str, str] | None = None,
        reports: Sequence[RankReport] = (),
        per_expert: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            ask: what each rank has done and holds now; asked at most once a second, from any thread.
            model_name: as clients name the model; a label of every metric.
            deployment_info: labels of the metric `deployment_info`.
            reports: of the ranks, for the metric `rank_info`.
            per_expert: one series for each expert of each layer, not one for each rank and layer.
            clock: the one that `EngineRequest.arrival_time` is of.
        """
        self._history = LoadHistory()
        self._sampler = RankSampler(ask, on_sample=self._history.add, clock=clock)
        self.observer = RequestRecorder(model_name, clock)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self.observer)
        self.registry.register(
            RankCollector(
                self._sampler.latest,
                self._history.load,
                model_name=model_name,
                deployment_info=deployment_info or {},
                reports=reports,
                per_expert=per_expert,
            )
        )
        self._log = ActivityLog(self._sampler.latest, clock)
        self._closing = threading.Event()

    @classmethod
    def of(cls, deployment: Deployment, *, model_name: str, per_expert: bool = False) -> DeploymentMetrics:
        """Of a running deployment."""
        plan = deployment.plan
        return cls(
            deployment.stats,
            model_name=model_name,
            deployment_info={
                "version": __version__,
                "architecture": plan.info.architecture,
                "expert_parallel_size": str(plan.config.expert_parallel_size),
                "dtype": plan.config.dtype,
                "quantization": plan.config.quantization or "none",
            },
            reports=deployment.connection.reports,
            per_expert=per_expert,
        )

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body of `/metrics` and its content type, in the format that the request's Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def load_snapshot(self) -> dict[str, Any]:
        """How the experts' load moved over the last seconds, for JSON; docs/metrics.md lists the keys."""
        answering = self._sampler.latest() is not None
        return {"ranks_answer": answering, **self._history.snapshot()}

    def start(self, *, log: bool = True, to_ray: bool = False, interval_s: float = LOG_INTERVAL_S) -> None:
        """Log, and mirror to Ray, every `interval_s` seconds while requests are in flight, until `close`."""
        bridge = RayBridge(self.registry.collect) if to_ray else None
        threading.Thread(
            target=self._run, args=(log, bridge, interval_s), name="metrics", daemon=True
        ).start()

    def close(self) -> None:
        """End what `start` began. Safe to call again."""
        self._closing.set()

    def _run(self, log: bool, bridge: RayBridge | None, interval_s: float) -> None:
        self._log.begin()
        was_active = True  # so that Ray hears of the deployment before its first request
        while not self._closing.wait(interval_s):
            active = self.observer.take_activity()
            try:
                if log:
                    self._log.look(active)
                if bridge is not None and (active or was_active):  # once more when it has become idle
                    bridge.push()
            except Exception:  # what is seen must never depend on a line in the log
                logger.exception("metrics could not be shown")
            was_active = active
