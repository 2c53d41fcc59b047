"""A head that gives nothing away, whose workers join while a driver waits for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster

from moe_runtime.cluster import Placement, resolve_device
from moe_runtime.errors import PlacementError


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    waiting = ThreadPoolExecutor(1)  # nodes are added by the main thread, the only one that may
    try:
        ray.init(address=cluster.address)
        with pytest.raises(PlacementError, match="no worker has joined yet"):
            resolve_device("auto", 1)
        with pytest.raises(
            PlacementError, match=r"needs 2 GPUs, the cluster has 0 .*; waited 1 s for more nodes"
        ):
            Placement.reserve(2, "cuda", timeout_s=1)
        device = waiting.submit(resolve_device, "auto", 60)
        cluster.add_node(num_cpus=2, num_gpus=2)
        assert device.result() == "cuda"
        reserved = waiting.submit(Placement.reserve, 4, "cuda", timeout_s=60)
        cluster.add_node(num_cpus=2, num_gpus=2)
        placement = reserved.result()
        assert len({slot.node_id for slot in placement.slots}) == 2
        placement.remove()
    finally:
        waiting.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
