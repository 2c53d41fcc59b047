"""Named deployments: owned by a detached actor, so that they outlive drivers and several drivers share one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from moe_runtime.deployment import Deployment, Plan
from moe_runtime.engine import Connection, Engine
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError
from moe_runtime.rank_spec import RankStats

NAMESPACE = "moe_runtime"
_PROGRESS_INTERVAL_S = 0.2

T = TypeVar("T")


class DeploymentOwner:
    """The detached actor: holds placement group and ranks, and tells drivers how to reach them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._engine: Engine | None = None
        self._loaded_bytes = 0

    async def start(self) -> None:
        """Start the ranks; raises what `Engine` raises."""
        self._engine = await asyncio.to_thread(self._plan.start, self._count)

    async def loaded_bytes(self) -> int:
        """Checkpoint bytes that all ranks together have read so far."""
        return self._loaded_bytes

    async def describe(self) -> tuple[Plan, Connection]:
        """What a driver needs to attach."""
        return self._plan, self._running().connection

    async def ask(self, method: str) -> Any:
        """Result of a method of the engine."""
        return await asyncio.to_thread(getattr(self._running(), method))

    async def wait_for_end(self) -> MoeRuntimeError | None:
        """Return when the deployment has ended, with what ended it."""
        return await asyncio.to_thread(self._running().wait_for_end)

    async def stop(self) -> None:
        """End the ranks and give their resources back."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)

    def _count(self, num_bytes: int) -> None:
        self._loaded_bytes += num_bytes

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineDeadError("the deployment is still starting; try again")
        return self._engine


class NamedDeployment(Deployment):
    """A driver's view of a deployment that a DeploymentOwner holds."""

    def __init__(self, name: str, owner: Any) -> None:
        self._name = name
        self._owner = owner
        self.plan, self.connection = self._get(owner.describe.remote())

    @classmethod
    def start(
        cls, name: str, plan: Plan, on_loaded_bytes: Callable[[int], None] | None = None
    ) -> NamedDeployment:
        """Create the owner and its ranks.

        Raises:
            ConfigError: the name is taken.
        """
        actor = ray.remote(num_cpus=0, max_restarts=0)(DeploymentOwner)
        try:
            owner = actor.options(
                name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=False
            ).remote(plan)
        except ValueError as error:
            raise ConfigError(
                f"a deployment named {name!r} is running already; attach with LLM.connect({name!r}), end it with "
                f"`moe-runtime stop {name}`, or choose another name"
            ) from error
        try:
            started = owner.start.remote()
            _report_progress(owner, started, on_loaded_bytes)
            _unwrapped(name, lambda: ray.get(started))
            return cls(name, owner)
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

    def check_health(self) -> None:
        self._get(self._owner.ask.remote("check_health"))

    def on_end(self, callback: Callable[[MoeRuntimeError | None], None]) -> None:
        ended = self._owner.wait_for_end.remote()

        def wait() -> None:
            try:
                callback(self._get(ended))
            except MoeRuntimeError as error:
                callback(error)

        threading.Thread(target=wait, name="on-end", daemon=True).start()

    def release(self) -> None:
        """Others may use it: it goes on."""

    def _get(self, ref: Any) -> Any:
        return _unwrapped(self._name, lambda: ray.get(ref))


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


def _report_progress(owner: Any, started: Any, on_loaded_bytes: Callable[[int], None] | None) -> None:
    seen = 0
    while not ray.wait([started], timeout=_PROGRESS_INTERVAL_S)[0]:
        try:
            loaded = ray.get(owner.loaded_bytes.remote(), timeout=1)
        except (RayActorError, GetTimeoutError):
            time.sleep(_PROGRESS_INTERVAL_S)
            continue
        if on_loaded_bytes:
            on_loaded_bytes(loaded - seen)
        seen = loaded


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
