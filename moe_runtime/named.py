"""Named deployments: owned by a detached actor, so that they outlive drivers and several drivers share one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from moe_runtime.deployment import DRIVER, Deployment, Plan
from moe_runtime.engine import Connection, Engine
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError
from moe_runtime.rank_spec import RankStats, StartUpStep

NAMESPACE = "moe_runtime"
_PROGRESS_INTERVAL_S = 0.2
# Above what the engine allows its ranks (10 s, 120 s for an RPC), whose error says more: an owner that needs longer is
# frozen, or its node is.
_ANSWER_TIMEOUT_S = 15.0
_RPC_TIMEOUT_S = 130.0
_DESCRIBE_TIMEOUT_S = 60.0  # its process may be starting

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerStatus:
    """What a named deployment says of itself at any time, also while it starts and after it has ended."""

    model: str
    num_ranks: int
    state: str  # starting, running, ended
    reason: str | None  # what ended it


class DeploymentOwner:
    """The detached actor: holds placement group and ranks, and tells drivers how to reach them."""

    def __init__(self, plan: Plan, log_level: int) -> None:
        # Ray warns of each blocking get in an actor like this; the engine's are in threads beside the event loop.
        os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"
        logging.basicConfig(level=log_level, format="%(levelname)s %(name)s: %(message)s")
        self._plan = plan
        self._engine: Engine | None = None
        self._end: asyncio.Future[MoeRuntimeError | None] | None = None  # what wait_for_end gives
        self._progress: dict[str, StartUpStep] = {}  # by phase: all that the ranks have done so far

    def __repr__(self) -> str:
        return f"owner of {self._plan.name}"  # what Ray puts in front of its lines

    async def start(self) -> None:
        """Start the ranks; raises what `Engine` raises."""
        self._engine = await asyncio.to_thread(self._plan.start, self._count)

    async def progress(self) -> list[StartUpStep]:
        """What all ranks together have done so far, in the order of the phases."""
        return list(self._progress.values())

    async def plan(self) -> Plan:
        """What it was told to deploy; answers at any time."""
        return self._plan

    async def describe(self) -> tuple[Plan, Connection]:
        """What a driver needs to attach."""
        return self._plan, self._running().connection

    async def status(self) -> OwnerStatus:
        """What the deployment is and how it does."""
        engine = self._engine
        if engine is None:
            state, reason = "starting", None
        elif engine.ended:
            state, reason = "ended", str(engine.failure or "it was stopped")
        else:
            state, reason = "running", None
        ranks = self._plan.config.expert_parallel_size
        return OwnerStatus(model=self._plan.files.name, num_ranks=ranks, state=state, reason=reason)

    async def ask(self, method: str, *args: Any) -> Any:
        """Result of a method of the engine."""
        return await asyncio.to_thread(getattr(self._running(), method), *args)

    async def wait_for_end(self) -> MoeRuntimeError | None:
        """Return when the deployment has ended, with what ended it."""
        if self._end is None:
            # One thread for all drivers, also for those that have left: a thread each would use up the pool, and
            # nothing that the owner is asked would be answered any more.
            self._end = asyncio.ensure_future(asyncio.to_thread(self._running().wait_for_end))
        return await asyncio.shield(self._end)

    async def stop(self) -> None:
        """End the ranks and give their resources back."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)

    def _count(self, step: StartUpStep) -> None:
        before = self._progress.get(step.phase)
        amount = step.amount + (before.amount if before else 0)
        self._progress[step.phase] = StartUpStep(step.phase, amount, step.total)

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineDeadError("the deployment is still starting; try again")
        return self._engine


class NamedDeployment(Deployment):
    """A driver's view of a deployment that a DeploymentOwner holds."""

    def __init__(self, name: str, owner: Any, *, ends_with_us: bool = False) -> None:
        self._name = name
        self._owner = owner
        self._ends_with_us = ends_with_us
        self.plan, self.connection = self._get(owner.describe.remote(), _DESCRIBE_TIMEOUT_S)

    @classmethod
    def start(
        cls, name: str, plan: Plan, on_progress: Callable[[StartUpStep], None] | None = None
    ) -> NamedDeployment:
        """Create the owner and its ranks.

        Raises:
            ConfigError: the name is taken.
        """
        ends_with_us = plan.keeper == DRIVER
        actor = ray.remote(num_cpus=0, max_restarts=0)(DeploymentOwner)
        try:
            owner = actor.options(
                name=name,
                namespace=NAMESPACE,
                lifetime="non_detached" if ends_with_us else "detached",
                get_if_exists=False,
            ).remote(plan, logging.getLogger().getEffectiveLevel())
        except ValueError as error:
            raise ConfigError(
                f"a deployment named {name!r} is running already; attach with LLM.connect({name!r}), end it with "
                f"`moe-runtime stop {name}`, or choose another name"
            ) from error
        try:
            started = owner.start.remote()
            _report_progress(owner, started, on_progress)
            _unwrapped(name, lambda: ray.get(started))
            return cls(name, owner, ends_with_us=ends_with_us)
        except BaseException:
            _end(owner)
            raise

    @classmethod
    def attach(cls, name: str) -> NamedDeployment:
        """Find a running deployment.

        Raises:
            ConfigError: there is none of that name.
        """
        return cls(name, find_owner(name))

    def stats(self) -> list[RankStats]:
        return self._get(self._owner.ask.remote("stats"))

    def expert_load(self) -> list[list[list[int]]]:
        return self._get(self._owner.ask.remote("expert_load"))

    def collective_rpc(self, method: str, *args: Any) -> list[Any]:
        return self._get(self._owner.ask.remote("collective_rpc", method, *args), _RPC_TIMEOUT_S)

    def check_health(self) -> None:
        self._get(self._owner.ask.remote("check_health"))

    def on_end(self, callback: Callable[[MoeRuntimeError | None], None]) -> None:
        def done(ended: Future[MoeRuntimeError | None]) -> None:
            try:
                callback(_unwrapped(self._name, ended.result))
            except MoeRuntimeError as error:
                callback(error)

        # No thread of ours waits for it: one that still did when Ray is shut down would end the driver badly.
        self._owner.wait_for_end.remote().future().add_done_callback(done)

    def release(self) -> None:
        """It goes on for others, unless its plan says that it ends with this driver. Safe to call again."""
        if self._ends_with_us:
            self._ends_with_us = False
            _end(self._owner)

    def _get(self, ref: Any, timeout_s: float | None = None) -> Any:
        limit = _ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
        try:
            return _unwrapped(self._name, lambda: ray.get(ref, timeout=limit))
        except GetTimeoutError as error:
            raise EngineDeadError(
                f"the owner of the deployment {self._name!r} did not answer within {limit:g} s: it is frozen, or its "
                "node is, or the network to it; see `ray status`, and end it with "
                f"`moe-runtime stop {self._name}`"
            ) from error


def find_owner(name: str) -> Any:
    """The owner of the deployment named `name`; ConfigError, with the names there are, if it is not running."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        names = deployment_names()
        have = f"running: {', '.join(names)}" if names else "none is running"
        raise ConfigError(f"no deployment named {name!r}; {have}") from error


def deployment_names() -> list[str]:
    """Names of the deployments of this cluster."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def deployment_plan(name: str) -> Plan | None:
    """What a deployment was told to be, also while it starts and after it has ended; None if its owner is silent.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        plan: Plan = ray.get(find_owner(name).plan.remote(), timeout=10)
    except (RayActorError, GetTimeoutError):
        return None
    return plan


def stop_deployment(name: str) -> None:
    """End a deployment, whoever uses it; returns when its ranks and its owner are gone.

    Raises:
        ConfigError: there is none of that name.
    """
    _end(find_owner(name))


def _end(owner: Any) -> None:
    # If it does not answer it is killed all the same, and Ray ends the actors and the group that it owns.
    with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):
        ray.get(owner.stop.remote(), timeout=10)
    ray.kill(owner)


def _report_progress(owner: Any, started: Any, on_progress: Callable[[StartUpStep], None] | None) -> None:
    seen: dict[str, int] = {}
    while not ray.wait([started], timeout=_PROGRESS_INTERVAL_S)[0]:
        try:
            steps: list[StartUpStep] = ray.get(owner.progress.remote(), timeout=1)
        except (RayActorError, GetTimeoutError):
            time.sleep(_PROGRESS_INTERVAL_S)
            continue
        for step in steps:
            if on_progress:
                on_progress(dataclasses.replace(step, amount=step.amount - seen.get(step.phase, 0)))
            seen[step.phase] = step.amount


def _unwrapped(name: str, call: Callable[[], T]) -> T:
    """The result of a call of the owner; our own errors come out as they were raised there."""
    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, MoeRuntimeError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise EngineDeadError(f"the deployment {name!r} has ended: its owner is gone") from error
