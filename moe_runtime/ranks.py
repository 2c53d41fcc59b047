"""The rank actors as the driver sees them: started together, called together, and ended together.

The driver imports no torch for this: the actor class is a shell that imports its worker on the rank.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import LOG_PREFIX_ACTOR_NAME
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_runtime.cluster import CPU_RANK_BUNDLE, GPU_RANK_BUNDLE, Placement
from moe_runtime.errors import MoeRuntimeError, PeerLostError, RankFailedError

DEFAULT_WORKER = "moe_runtime.worker:RankWorker"

# When a rank fails, its peers fail in a collective, and their errors may arrive first. The first of them
# starts this wait for the error that tells the cause.
_CAUSE_WAIT_S = 3.0


class RankActor:
    """Shell around a worker, so that only the rank's process imports it.

    Whatever the process writes, its libraries' C code included, Ray carries to the driver that started it, each
    line with `repr` of the actor in front: rank and node.
    """

    def __init__(self, rank: int, log_level: int, worker: str, *args: Any) -> None:
        self._name = f"rank {rank}, {ray.util.get_node_ip_address()}"
        self._broken: Exception | None = None
        logging.basicConfig(level=log_level, format="%(levelname)s %(name)s: %(message)s")
        for stream in (sys.stdout, sys.stderr):
            # Ray asks for `repr` only when the constructor is done; this names the lines of the constructor too.
            print(f"{LOG_PREFIX_ACTOR_NAME}{self._name}", file=stream, flush=True)
        try:
            module, _, name = worker.partition(":")
            self._worker = getattr(importlib.import_module(module), name)(*args)
        except Exception as error:
            # Of an error in an actor's constructor Ray keeps nothing but its text; `call` raises it whole.
            self._broken = error

    def __repr__(self) -> str:
        return self._name

    def call(self, method: str, *args: Any) -> Any:
        if self._broken:
            raise self._broken
        return getattr(self._worker, method)(*args)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        yield from self.call(method, *args)

    @ray.method(concurrency_group="control")
    def ask(self, method: str, *args: Any) -> Any:
        """Like `call`, in a thread of its own: it runs while `call` or `stream` is at work."""
        return self.call(method, *args)


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a rank runs, for messages."""

    rank: int
    node_ip: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node_ip}, pid {self.pid})"


class Ranks:
    """All rank actors of a deployment.

    An error in any of them, or its death, ends all of them: `call` and `stream` raise RankFailedError that
    names the rank, or the rank's own error where it is one of ours (a broken checkpoint, say).
    """

    def __init__(self, placement: Placement, device: str, worker: str, specs: Sequence[Any]) -> None:
        self._placement = placement
        bundle = GPU_RANK_BUNDLE if device == "cuda" else CPU_RANK_BUNDLE
        actor = ray.remote(concurrency_groups={"control": 1})(RankActor)
        log_level = logging.getLogger().getEffectiveLevel()
        self._actors = [
            actor.options(
                # For whoever lists actors. Ray also registers an actor that has a name before this call returns:
                # one that is killed before that has Ray write an error of its own to our standard error.
                name=f"rank {rank} of {placement.group.id.hex()}",
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement.group, placement_group_bundle_index=slot.bundle
                ),
            ).remote(rank, log_level, worker, spec)
            for rank, (slot, spec) in enumerate(zip(placement.slots, specs, strict=True))
        ]
        self._addresses: dict[int, RankAddress] = {}
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether a rank failed, or `kill` was called: they take no more calls."""
        return self._ended

    def __len__(self) -> int:
        return len(self._actors)

    def locate(self) -> list[RankAddress]:
        """Ask every rank where it runs; later failures name it."""
        places = self.call("where")
        self._addresses = {rank: RankAddress(rank, *place) for rank, place in enumerate(places)}
        return list(self._addresses.values())

    def call_one(self, rank: int, method: str, *args: Any) -> Any:
        """Result of `method` on one rank."""
        return next(self._gather({rank: self._actors[rank].call.remote(method, *args)}))[1]

    def call(self, method: str, *args: Any) -> list[Any]:
        """Results of `method(*args)` on every rank at once, in rank order."""
        return self.call_each(method, [args] * len(self))

    def call_each(self, method: str, args_of_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Like `call`, with arguments of its own for each rank."""
        pending = {
            rank: actor.call.remote(method, *args)
            for rank, (actor, args) in enumerate(zip(self._actors, args_of_rank, strict=True))
        }
        results = dict(self._gather(pending))
        return [results[rank] for rank in range(len(self))]

    def stream(self, method: str, args_of_rank: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Run generator `method` on every rank at once; yields (rank, item) as they come."""
        pending = {
            rank: actor.stream.options(num_returns="streaming").remote(method, *args)
            for rank, (actor, args) in enumerate(zip(self._actors, args_of_rank, strict=True))
        }
        yield from self._gather(pending)

    def ask(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Results of a short `method` on every rank, run beside what the ranks are doing, in rank order.

        Raises:
            RankFailedError: a rank did not answer in time, or has died.
        """
        refs = [actor.ask.remote(method, *args) for actor in self._actors]
        try:
            return ray.get(refs, timeout=timeout_s)
        except GetTimeoutError as error:
            answered, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            who = ", ".join(self._name(rank) for rank, ref in enumerate(refs) if ref not in answered)
            raise RankFailedError(f"{who} did not answer {method!r} within {timeout_s:g} s") from error
        except RayActorError as error:
            raise RankFailedError(f"a rank has died: {' '.join(str(error).split())}") from error

    def kill(self) -> None:
        """End every actor and give its resources back; safe to call again, and after a failure."""
        self._ended = True
        if ray.is_initialized():
            for actor in self._actors:
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(actor)
        self._placement.remove()

    def _gather(self, pending: dict[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield (rank, value) from object refs and streaming generators until all have ended."""
        rank_of = {handle: rank for rank, handle in pending.items()}
        failures: dict[int, Exception] = {}
        deadline: float | None = None
        while rank_of:
            wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(rank_of), num_returns=1, timeout=wait_s)
            if not ready:
                break
            handle = ready[0]
            rank = rank_of[handle]
            try:
                if isinstance(handle, ray.ObjectRef):
                    del rank_of[handle]
                    value = ray.get(handle)
                else:
                    value = ray.get(next(handle))
            except StopIteration:
                del rank_of[handle]
                continue
            except RayError as error:
                rank_of.pop(handle, None)
                failures[rank] = error
                deadline = deadline or time.monotonic() + _CAUSE_WAIT_S
                if not _is_peer_lost(error):
                    break
                continue
            if not failures:
                yield rank, value
        if failures:
            self.kill()
            raise self._explain(failures, silent=sorted(rank_of.values()))

    def _explain(self, failures: dict[int, Exception], silent: list[int]) -> MoeRuntimeError:
        """One error for all: the cause where a rank told it, else the ranks that their peers lost."""
        causes = [rank for rank, error in failures.items() if not _is_peer_lost(error)]
        if not causes:
            return self._explain_lost(failures, silent)
        rank = causes[0]
        error = failures[rank]
        who = self._name(rank)
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, MoeRuntimeError) and not isinstance(cause, PeerLostError):
                cause.add_note(f"raised by {who}")
                return cause
            return RankFailedError(
                f"{who} failed: {type(cause).__name__}: {cause}; every request in flight ended with it. "
                f"Its traceback:\n{error}"
            )
        if isinstance(error, RayActorError):
            detail = " ".join(str(error).split())
            return RankFailedError(f"{who} died; every request in flight ended with it. Ray says: {detail}")
        return RankFailedError(f"{who} failed: {type(error).__name__}: {error}")

    def _explain_lost(self, failures: dict[int, Exception], silent: list[int]) -> RankFailedError:
        """Every failure is the loss of a peer: the ranks that say nothing are frozen or cut off."""
        rank, error = next(iter(failures.items()))
        reason = f"{self._name(rank)} reports: {getattr(error, 'cause', error)}"
        if silent:
            who = ", ".join(map(self._name, silent))
            return RankFailedError(
                f"{who} stopped answering; every request in flight ended with it. {reason}"
            )
        return RankFailedError(
            f"the ranks lost each other; every request in flight ended with that. {reason}"
        )

    def _name(self, rank: int) -> str:
        return str(self._addresses.get(rank, f"rank {rank}"))


def _is_peer_lost(error: Exception) -> bool:
    return isinstance(error, RayTaskError) and isinstance(error.cause, PeerLostError)
