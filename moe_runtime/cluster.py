"""Ray: connecting to it, what it has, and which bundle of it each rank gets."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from moe_runtime.errors import ConfigError, PlacementError

# Whole CPUs would keep more ranks than cores pending for ever; a rank's threads are divided by us instead.
CPU_RANK_BUNDLE = {"CPU": 0.01}
GPU_RANK_BUNDLE = {"GPU": 1.0, "CPU": 1.0}


def ensure_ray(*, must_outlive_us: bool = False) -> bool:
    """Connect to the Ray that RAY_ADDRESS or the machine offers, else start one here.

    Args:
        must_outlive_us: a Ray started here would end with this process, so there must be one already.

    Returns whether this call connected, in which case the caller owes `ray.shutdown()`.

    Raises:
        ConfigError: there is no Ray that would outlive this process.
    """
    if ray.is_initialized():
        return False
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _init_ray()
    except ConnectionError:
        # The address that an earlier Ray left behind leads nowhere. An address that the user gave is not ours
        # to overrule.
        if os.environ.get("RAY_ADDRESS"):
            raise
        _init_ray(address="local")
    if threading.current_thread() is threading.main_thread():
        # Ray has put a handler of its own there, which dumps its stack on SIGTERM.
        signal.signal(signal.SIGTERM, handler if callable(handler) else _leave)
    # Ray says nowhere else whether `init` found a cluster or started one.
    if must_outlive_us and ray._private.worker._global_node.is_head():
        ray.shutdown()
        raise ConfigError(
            "a named deployment outlives its driver, and there is no Ray cluster here that does; start one with "
            "`ray start --head`, or set RAY_ADDRESS"
        )
    return True


def _init_ray(**options: str) -> None:
    """`ray.init` that leaves nothing behind when it is interrupted.

    Ray ends the servers that it has started by then, but not the agents that those have started, which need
    a minute to notice.
    """
    # Ray would start the ranks at niceness 15, and anything else on the machine would take their cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ours = psutil.Process()
    before = ours.children(recursive=True)
    try:
        ray.init(include_dashboard=False, logging_level="error", **options)
    except BaseException:
        for process in set(ours.children(recursive=True)).difference(before):
            with contextlib.suppress(psutil.Error):
                if "ray" in " ".join(process.cmdline()):
                    process.kill()
        raise


def _leave(signum: int, frame: FrameType | None) -> None:
    """On SIGTERM: end as on an exception, so that ranks and Ray are ended too."""
    sys.exit(128 + signum)


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` where the cluster has GPUs, else `cpu`."""
    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


@dataclass(frozen=True, slots=True)
class RankSlot:
    """Where a rank runs."""

    bundle: int  # index in the placement group
    node_id: str


class Placement:
    """One bundle a rank, reserved in one placement group; ranks of a node are neighbours."""

    def __init__(self, group: PlacementGroup, slots: tuple[RankSlot, ...]) -> None:
        self.group = group
        self.slots = slots

    @classmethod
    def reserve(cls, num_ranks: int, device: str, timeout_s: float, strategy: str = "PACK") -> Placement:
        """Reserve the bundles of `num_ranks` ranks by one of Ray's placement strategies.

        Raises:
            PlacementError: the cluster has fewer GPUs or nodes than it takes, or they did not come free in
                time.
        """
        bundle = GPU_RANK_BUNDLE if device == "cuda" else CPU_RANK_BUNDLE
        _check_room(num_ranks, device, strategy)
        group = placement_group([bundle] * num_ranks, strategy=strategy)
        try:
            if not group.wait(timeout_s):
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
            remove_placement_group(self.group)


def _check_room(ranks: int, device: str, strategy: str) -> None:
    """Refuse at once what this cluster could never hold: its placement group would stay pending for ever."""
    if device == "cuda":
        room = [int(node["Resources"].get("GPU", 0)) for node in _alive_nodes()]
        if sum(room) < ranks:
            raise PlacementError(
                f"expert_parallel_size={ranks} needs {ranks} GPUs, the cluster has {sum(room)} "
                f"({_nodes_text()}); lower it, add GPU nodes, or use device='cpu'"
            )
    else:
        room = [ranks if node["Resources"].get("CPU") else 0 for node in _alive_nodes()]
    what = "GPUs" if device == "cuda" else "CPUs"
    if strategy == "STRICT_PACK" and max(room) < ranks:
        raise PlacementError(
            f"placement_strategy=STRICT_PACK needs one node with {what} for all {ranks} ranks, the cluster has "
            f"{_nodes_text()}; use PACK"
        )
    nodes = sum(here > 0 for here in room)
    if strategy == "STRICT_SPREAD" and nodes < ranks:
        raise PlacementError(
            f"placement_strategy=STRICT_SPREAD needs a node with {what} for each of {ranks} ranks, the cluster "
            f"has {nodes} ({_nodes_text()}); use SPREAD"
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
