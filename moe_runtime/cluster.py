"""Ray: what it has, and which bundle of it each rank gets."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from moe_runtime.errors import PlacementError

logger = logging.getLogger(__name__)

# Whole CPUs would keep more ranks than cores pending for ever; a rank's threads are divided by us instead.
CPU_RANK_BUNDLE = {"CPU": 0.01}
GPU_RANK_BUNDLE = {"GPU": 1.0, "CPU": 1.0}
_POLL_INTERVAL_S = 0.5


def resolve_device(device: str, timeout_s: float = 60.0) -> str:
    """`auto` becomes `cuda` where the cluster has GPUs, else `cpu`.

    While its workers start, a cluster may have a head alone that gives nothing away; `cpu` would then be a guess.

    Args:
        timeout_s: seconds to wait for the first node that a rank could run on.

    Raises:
        PlacementError: none has joined in time.
    """
    if device != "auto":
        return device
    resources = _resources_for_ranks(timeout_s)
    return "cuda" if resources.get("GPU", 0) > 0 else "cpu"


def _resources_for_ranks(timeout_s: float) -> dict[str, float]:
    """The cluster's resources, as soon as there are GPUs or CPUs among them."""
    deadline: float | None = None
    while True:
        resources: dict[str, float] = ray.cluster_resources()
        if resources.get("GPU", 0) > 0 or resources.get("CPU", 0) > 0:
            return resources
        now = time.monotonic()
        if deadline is None:
            deadline = now + timeout_s
            logger.warning("waiting up to %g s for a worker to join; now: %s", timeout_s, _nodes_text())
        if now >= deadline:
            raise PlacementError(
                f"no worker has joined yet, {timeout_s:g} s waited; the cluster has {_nodes_text()}; `ray status` "
                "says which are on their way: raise placement_timeout_s, or for device='cpu' on the head start it "
                "with CPUs (ray start --head --num-cpus)"
            )
        time.sleep(_POLL_INTERVAL_S)


@dataclass(frozen=True, slots=True)
class RankSlot:
    """Where a rank runs."""

    bundle: int  # index in the placement group
    node_id: str


_GROUP_PREFIX = "moe_runtime"
_REMOVE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class GroupName:
    """What the name of a placement group says of the deployment that it belongs to."""

    deployment: str | None  # None: it has no name, and ends with its driver
    model: str

    def encode(self) -> str:
        """A name that no other placement group has."""
        deployment = quote(self.deployment or "", safe="")
        return f"{_GROUP_PREFIX}/{secrets.token_hex(4)}/{deployment}/{self.model}"

    @classmethod
    def decode(cls, name: str) -> GroupName | None:
        """Inverse of `encode`; None for a placement group of somebody else."""
        parts = name.split("/", 3)
        if len(parts) != 4 or parts[0] != _GROUP_PREFIX:
            return None
        return cls(unquote(parts[2]) or None, parts[3])


class Placement:
    """One bundle a rank, reserved in one placement group; ranks of a node are neighbours."""

    def __init__(self, group: PlacementGroup, slots: tuple[RankSlot, ...]) -> None:
        self.group = group
        self.slots = slots

    @classmethod
    def reserve(
        cls, num_ranks: int, device: str, timeout_s: float, strategy: str = "PACK", name: str = ""
    ) -> Placement:
        """Reserve the bundles of `num_ranks` ranks by one of Ray's placement strategies.

        Args:
            timeout_s: seconds to wait for room, and for the nodes of a cluster that is too small so far.
            name: of the placement group, for those who look at the cluster; "" for none.

        Raises:
            PlacementError: the cluster has fewer GPUs or nodes than it takes, or they did not come free in
                time. At once, where no other node can join.
        """
        bundle = GPU_RANK_BUNDLE if device == "cuda" else CPU_RANK_BUNDLE
        try:
            _check_room(num_ranks, device, strategy)
        except PlacementError as error:
            if _is_our_own_ray():
                raise
            logger.warning("waiting up to %g s for more nodes: %s", timeout_s, error)
        # Waiting for a group that exists, and not for nodes: it is what tells an autoscaler to start some.
        group = placement_group([bundle] * num_ranks, strategy=strategy, name=name)
        try:
            if not group.wait(timeout_s):
                _check_room(num_ranks, device, strategy, f"; waited {timeout_s:g} s for more nodes")
                raise PlacementError(
                    f"no room for {num_ranks} ranks of {bundle} within {timeout_s:g} s; the cluster has "
                    f"{_nodes_text()}, free now: {_free_text()}; end what uses them, or raise placement_timeout_s"
                )
            node_of_bundle = placement_group_table(group)["bundles_to_node_id"]
            order = sorted(range(num_ranks), key=lambda b: (node_of_bundle[b], b))
            return cls(group, tuple(RankSlot(b, node_of_bundle[b]) for b in order))
        except BaseException:
            remove_placement_group(group)
            raise

    def remove(self) -> None:
        """Give the bundles back; actors that still run in them are killed by Ray."""
        if ray.is_initialized():
            # Ray's call waits for ever where this node's own Ray was ended together with us, as a service
            # manager does that signals every process.
            removing = threading.Thread(target=remove_placement_group, args=(self.group,), daemon=True)
            removing.start()
            removing.join(_REMOVE_TIMEOUT_S)


def _is_our_own_ray() -> bool:
    """Whether this process started Ray for itself. Any other may grow: Ray does not tell which have an autoscaler,
    and without one machines join as they boot.
    """
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def joined_node_ip() -> str | None:
    """This node's address in the cluster that this process joined; None on a Ray of its own, or without one."""
    if not ray.is_initialized() or _is_our_own_ray():
        return None
    here = ray.get_runtime_context().get_node_id()
    return next((str(node["NodeManagerAddress"]) for node in _alive_nodes() if node["NodeID"] == here), None)


def _check_room(ranks: int, device: str, strategy: str, waited: str = "") -> None:
    """Refuse what the nodes that are here could never hold; `waited` ends the message."""
    if device == "cuda":
        room = [int(node["Resources"].get("GPU", 0)) for node in _alive_nodes()]
        if sum(room) < ranks:
            raise PlacementError(
                f"expert_parallel_size={ranks} needs {ranks} GPUs, the cluster has {sum(room)} "
                f"({_nodes_text()}); lower it, add GPU nodes, or use device='cpu'{waited}"
            )
    else:
        room = [ranks if node["Resources"].get("CPU") else 0 for node in _alive_nodes()]
        if not any(room):
            raise PlacementError(
                f"CPU ranks need a node with CPUs, the cluster has {_nodes_text()}; add one, or start a node with "
                f"--num-cpus{waited}"
            )
    what = "GPUs" if device == "cuda" else "CPUs"
    if strategy == "STRICT_PACK" and max(room) < ranks:
        raise PlacementError(
            f"placement_strategy=STRICT_PACK needs one node with {what} for all {ranks} ranks, the cluster has "
            f"{_nodes_text()}; use PACK{waited}"
        )
    nodes = sum(here > 0 for here in room)
    if strategy == "STRICT_SPREAD" and nodes < ranks:
        raise PlacementError(
            f"placement_strategy=STRICT_SPREAD needs a node with {what} for each of {ranks} ranks, the cluster "
            f"has {nodes} ({_nodes_text()}); use SPREAD{waited}"
        )


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _nodes_text() -> str:
    """`"10.0.0.1: 8 CPU, 2 GPU; 10.0.0.2: ..."` for the nodes that are alive."""
    texts = []
    for node in _alive_nodes():
        has = node["Resources"]
        gpus = f", {has['GPU']:g} GPU" if has.get("GPU") else ", no GPU"
        texts.append(f"{node['NodeManagerAddress']}: {has.get('CPU', 0):g} CPU{gpus}")
    return "; ".join(texts)


def _free_text() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
