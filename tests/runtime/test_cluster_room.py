"""What a driver does on a cluster that is too small so far."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from moe_runtime import cluster
from moe_runtime.cluster import Placement, resolve_device
from moe_runtime.errors import PlacementError

HEAD: dict[str, float] = {"memory": 1e9}  # gives away neither CPUs nor GPUs
CPU_NODE = {"CPU": 8.0}
GPU_NODE = {"CPU": 8.0, "GPU": 4.0}


class FakeRay:
    """Nodes that join one after another, one at each look at the cluster's resources."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, here: list[dict[str, float]]) -> None:
        self.here = here
        self.to_come: list[dict[str, float]] = []
        monkeypatch.setattr(cluster.ray, "nodes", self._nodes)
        monkeypatch.setattr(cluster.ray, "cluster_resources", self._resources)
        monkeypatch.setattr(cluster, "_POLL_INTERVAL_S", 0.001)

    def _nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeManagerAddress": f"10.0.0.{i}", "Resources": has}
            for i, has in enumerate(self.here)
        ]

    def _resources(self) -> dict[str, float]:
        total = {key: sum(node.get(key, 0) for node in self.here) for node in self.here for key in node}
        self.here += self.to_come[:1]
        del self.to_come[:1]
        return total


class FakeGroup:
    """A placement group that is placed when `comes`, in the end."""

    def __init__(self, ray: FakeRay, comes: list[dict[str, float]]) -> None:
        self._ray, self._comes = ray, comes

    def wait(self, timeout_s: float) -> bool:
        self._ray.here += self._comes
        return bool(self._comes)


@pytest.mark.parametrize(
    ("nodes", "device"),
    [([CPU_NODE], "cpu"), ([HEAD, CPU_NODE], "cpu"), ([HEAD, GPU_NODE], "cuda")],
)
def test_auto_is_decided_at_once_where_a_rank_could_run(
    nodes: list[dict[str, float]],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    FakeRay(monkeypatch, nodes)
    assert resolve_device("auto", 60) == device
    assert caplog.messages == []


@pytest.mark.parametrize(("worker", "device"), [(CPU_NODE, "cpu"), (GPU_NODE, "cuda")])
def test_auto_waits_for_the_first_worker_of_a_head_that_gives_nothing_away(
    worker: dict[str, float],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    FakeRay(monkeypatch, [HEAD]).to_come = [HEAD, HEAD, worker]
    assert resolve_device("auto", 60) == device
    assert caplog.messages == [
        "waiting up to 60 s for a worker to join; now: 10.0.0.0: 0 CPU, no GPU; 10.0.0.1: 0 CPU, no GPU"
    ]


def test_a_worker_that_does_not_join_in_time_is_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeRay(monkeypatch, [HEAD])
    with pytest.raises(
        PlacementError, match=r"no worker has joined yet, 0\.01 s waited; .*0 CPU, no GPU; `ray st"
    ):
        resolve_device("auto", 0.01)
    assert resolve_device("cuda", 0.01) == "cuda"  # what was asked for needs no look


def _reserve(
    monkeypatch: pytest.MonkeyPatch, ray: FakeRay, *, joined: bool, comes: list[Any], **ask: Any
) -> Any:
    removed: list[Any] = []
    table = {"bundles_to_node_id": dict.fromkeys(range(8), "node")}
    monkeypatch.setattr(cluster, "_is_our_own_ray", lambda: not joined)
    monkeypatch.setattr(cluster, "placement_group", lambda bundles, **options: FakeGroup(ray, comes))
    monkeypatch.setattr(cluster, "placement_group_table", lambda group: table)
    monkeypatch.setattr(cluster, "remove_placement_group", removed.append)
    try:
        return Placement.reserve(8, **{"device": "cuda", "timeout_s": 7, **ask})
    except PlacementError:
        assert len(removed) == joined  # on a Ray of our own none was made
        raise


def test_nodes_that_a_joined_cluster_lacks_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(monkeypatch, [HEAD, GPU_NODE])
    placement = _reserve(monkeypatch, ray, joined=True, comes=[GPU_NODE])
    assert len(placement.slots) == 8
    (line,) = caplog.messages
    assert line.startswith(
        "waiting up to 7 s for more nodes: expert_parallel_size=8 needs 8 GPUs, the cluster has 4"
    )
    assert caplog.records[0].levelno == logging.WARNING  # shown unless told otherwise


@pytest.mark.parametrize(
    ("nodes", "ask", "words"),
    [
        ([GPU_NODE], {}, "expert_parallel_size=8 needs 8 GPUs, the cluster has 4 .*device='cpu'"),
        (
            [GPU_NODE] * 2,
            {"strategy": "STRICT_PACK"},
            "STRICT_PACK needs one node with GPUs for all 8 .*use PACK",
        ),
        ([CPU_NODE] * 2, {"strategy": "STRICT_SPREAD", "device": "cpu"}, "has 2 .*; use SPREAD"),
        ([HEAD], {"device": "cpu"}, "CPU ranks need a node with CPUs, the cluster has .*--num-cpus"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_what_never_fits_is_refused_at_once_on_a_ray_of_our_own_and_after_the_wait_on_others(
    joined: bool, nodes: list[Any], ask: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = "; waited 7 s for more nodes$" if joined else r"(?<!for more nodes)$"
    ray = FakeRay(monkeypatch, list(nodes))
    with pytest.raises(PlacementError, match=words + end):
        _reserve(monkeypatch, ray, joined=joined, comes=[], **ask)
