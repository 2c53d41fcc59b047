"""Two network namespaces as two hosts: a Ray node in each, EP=2 over the wire between them.

    two_hosts.py            (as root) makes the hosts, starts Ray on both, runs the driver on the first
    two_hosts.py driver     the driver

The hosts share nothing but the wire and the file system: what one offers on a loopback address, or on the
machine's own, the other cannot reach.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from moe_runtime import LLM
from tests.runtime.cluster.scenarios.two_nodes import GREEDY, PROMPTS, tokens

ADDRESSES = ("10.231.0.1", "10.231.0.2")
PORT = 6379
NAMESPACES = ("moe-runtime-test-a", "moe-runtime-test-b")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def remove_hosts() -> None:
    """Remove the namespaces, and the wire with them; those that are not there are no matter."""
    for name in NAMESPACES:
        subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Namespaces joined by a veth pair; each host's default route is the other one."""
    remove_hosts()
    try:
        for name in NAMESPACES:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            "eth0",
            "netns",
            NAMESPACES[0],
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            NAMESPACES[1],
        )
        for name, address in zip(NAMESPACES, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        for name, other in zip(NAMESPACES, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "route", "add", "default", "via", other)
        yield
    finally:
        remove_hosts()


@contextlib.contextmanager
def ray_node(host: int, *words: str) -> Iterator[None]:
    """A Ray node on a host, in a temporary directory of its own."""
    with tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *words]
        node = subprocess.Popen(
            ["ip", "netns", "exec", NAMESPACES[host], *command, f"--node-ip-address={ADDRESSES[host]}"],
            env={**os.environ, "RAY_TMPDIR": directory},
        )
        try:
            yield
        finally:
            node.terminate()  # `ray start --block` ends what it started
            node.wait(60)


def main() -> None:
    head = [f"--port={PORT}", "--head", "--include-dashboard=false", "--disable-usage-stats"]
    with (
        two_hosts(),
        ray_node(0, *head),
        ray_node(1, f"--address={ADDRESSES[0]}:{PORT}"),
    ):
        subprocess.run(
            ["ip", "netns", "exec", NAMESPACES[0], sys.executable, "-u", __file__, "driver"],
            env={**os.environ, "RAY_ADDRESS": f"{ADDRESSES[0]}:{PORT}"},
            check=True,
            timeout=240,
        )


def driver() -> None:
    ray.init(include_dashboard=False)
    while sum(node["Alive"] for node in ray.nodes()) < 2:
        time.sleep(0.1)
    alone = tokens("PACK", ranks=1, nodes=1)
    with LLM(
        expert_parallel_size=2,
        placement_strategy="STRICT_SPREAD",
        device="cpu",
        dtype="float32",
        use_tqdm=False,
    ) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == alone
        assert sorted(report.node_ip for report in llm.ranks) == list(ADDRESSES)
        wires = _connections_between(*(report.pid for report in llm.ranks))
    print("connections between the ranks:", wires)
    assert len(wires) >= 2, "the ranks meet in a store and exchange tokens through gloo"
    for here, there in wires:
        assert {here.split(":")[0], there.split(":")[0]} == set(ADDRESSES), (here, there)


def _connections_between(a: int, b: int) -> list[tuple[str, str]]:
    """Addresses of the sockets that join two processes, as the first sees them."""
    of_a, of_b = _connections(a), _connections(b)
    return [(here, there) for here, there in of_a if (there, here) in of_b]


def _connections(pid: int) -> set[tuple[str, str]]:
    """(local, remote) "address:port" of a process' TCP connections, as its own host sees them."""
    command = [
        "nsenter",
        "--net",
        f"--target={pid}",
        "ss",
        "--tcp",
        "--numeric",
        "--processes",
        "--no-header",
    ]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = set()
    for line in listing.splitlines():
        _, _, _, here, there, owner = line.split(maxsplit=5)
        if f"pid={pid}," in owner:
            found.add((_plain(here), _plain(there)))
    return found


def _plain(address: str) -> str:
    """ "10.0.0.1:80" also where it is written as the IPv6 "[::ffff:10.0.0.1]:80"."""
    return address.replace("[::ffff:", "").replace("]", "")


if __name__ == "__main__":
    driver() if sys.argv[1:] == ["driver"] else main()
