"""Deployments: one that ends with its driver, and a named one that drivers attach to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Connection, Engine
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.inspection import ModelInfo
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.rank_spec import RankStats, StartUpStep
from moe_runtime.registry import ModelTarget

DRIVER = "driver"  # a Plan's keeper: the driver that made it, however that ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be deployed: made by a driver, carried out by whoever owns the deployment."""

    files: ModelFiles
    target: ModelTarget
    info: ModelInfo
    config: EngineConfig
    name: str | None = None  # of the deployment; None: it ends with its driver
    keeper: str | None = None  # who ends a named one: DRIVER or another; None: whoever stops it by its name

    def start(self, on_progress: Callable[[StartUpStep], None] | None = None) -> Engine:
        """Start the ranks; returns when all serve."""
        placement = ExpertPlacement.contiguous(self.info.num_experts, self.config.expert_parallel_size)
        return Engine(
            self.files, self.target, placement, self.config, on_progress=on_progress, name=self.name
        )


class Deployment(ABC):
    """A running deployment as a driver sees it, whoever owns it."""

    plan: Plan
    connection: Connection

    @abstractmethod
    def stats(self) -> list[RankStats]:
        """What each rank has done and holds."""

    @abstractmethod
    def expert_load(self) -> list[list[list[int]]]:
        """For each rank, tokens that each local expert of each MoE layer computed."""

    @abstractmethod
    def collective_rpc(self, method: str, *args: Any) -> list[Any]:
        """Results of a method of each rank's worker, in rank order."""

    @abstractmethod
    def check_health(self) -> None:
        """Raises RankFailedError or EngineDeadError unless every rank answers."""

    @abstractmethod
    def on_end(self, callback: Callable[[MoeRuntimeError | None], None]) -> None:
        """Have `callback` called once, from another thread, when the deployment ends, with what ended it."""

    @abstractmethod
    def release(self) -> None:
        """This driver is done with it. Safe to call again."""


class OwnedDeployment(Deployment):
    """Belongs to this process and ends with it."""

    def __init__(self, plan: Plan, on_progress: Callable[[StartUpStep], None] | None = None) -> None:
        self.plan = plan
        self._engine = plan.start(on_progress)
        self.connection = self._engine.connection

    def stats(self) -> list[RankStats]:
        return self._engine.stats()

    def expert_load(self) -> list[list[list[int]]]:
        return self._engine.expert_load()

    def collective_rpc(self, method: str, *args: Any) -> list[Any]:
        return self._engine.collective_rpc(method, *args)

    def check_health(self) -> None:
        self._engine.check_health()

    def on_end(self, callback: Callable[[MoeRuntimeError | None], None]) -> None:
        engine = self._engine
        threading.Thread(target=lambda: callback(engine.wait_for_end()), name="on-end", daemon=True).start()

    def release(self) -> None:
        self._engine.shutdown()
