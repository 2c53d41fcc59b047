"""A Ray of one node that `ray start --head` makes, as on a cluster's head."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.util.state import list_actors, list_placement_groups

from tests.runtime.cluster.program import running

RAY = Path(sys.executable).with_name("ray")
# What drivers and `ray` commands that talk to it need to have in their environment.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True, slots=True)
class Head:
    """Where it answers."""

    address: str  # of the cluster, for RAY_ADDRESS
    dashboard: str  # URL: jobs, Serve, the state API
    metrics: str  # URL: what the node's processes export to Prometheus
    temp_directory: str  # RAY_TMPDIR, where its address is

    def left(self) -> list[Any]:
        """Actors that live and placement groups that hold resources."""
        actors = list_actors(self.dashboard, filters=[("state", "!=", "DEAD")])
        groups = list_placement_groups(self.dashboard, filters=[("state", "!=", "REMOVED")])
        return [*actors, *groups]


@contextmanager
def started_head(log_directory: Path, environment: Mapping[str, str | None] = ENVIRONMENT) -> Iterator[Head]:
    """Start it; at the end of the block stop it, and see that nothing of it is left."""
    names = (
        *("port", "ray-client-server-port", "metrics-export-port"),
        *("dashboard-port", "dashboard-agent-listen-port"),
    )
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    flags = [f"--{name}={port}" for name, port in ports.items()]
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    worker_ports = ["--min-worker-port=0", "--max-worker-port=0"]
    # Sockets lie below it, and their paths may have some 100 characters only.
    with tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        env = {**environment, "RAY_TMPDIR": directory, "RAY_worker_niceness": "0"}
        with running(
            log_directory, [*command, "--node-ip-address=127.0.0.1", *flags, *worker_ports], env
        ) as ray:
            ray.wait_for("Ray runtime started")
            yield Head(
                address=f"127.0.0.1:{ports['port']}",
                dashboard=f"http://127.0.0.1:{ports['dashboard-port']}",
                metrics=f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
                temp_directory=directory,
            )
            ray.signal(signal.SIGTERM)
            ray.finish()
            ray.assert_left_nothing(timeout_s=60)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return ports
