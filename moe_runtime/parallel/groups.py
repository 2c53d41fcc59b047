"""Process groups that join the ranks of a deployment, over addresses that other nodes can reach."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from moe_runtime.errors import PeerLostError
from moe_runtime.parallel.host_library import MAX_VALUES
from moe_runtime.parallel.host_link import HostLink, LinkUnavailableError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def collective(what: str) -> Iterator[None]:
    """Turn a backend's failure into PeerLostError, so that the driver looks for the cause elsewhere."""
    try:
        yield
    except RuntimeError as error:  # torch raises DistError and, from gloo, bare RuntimeError
        raise PeerLostError(f"{what} failed: {error}") from error


def host_store(node_ip: str, num_ranks: int, timeout_s: float) -> tuple[dist.TCPStore, tuple[str, int]]:
    """Rank 0: open the store where the ranks meet, on a free port of its own node's address."""
    store = dist.TCPStore(
        node_ip, 0, num_ranks, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )
    return store, (node_ip, store.port)


def connect_store(address: tuple[str, int], num_ranks: int, timeout_s: float) -> dist.TCPStore:
    """Any other rank: connect to rank 0's store.

    Raises:
        PeerLostError: it cannot be reached within `timeout_s` seconds.
    """
    with collective(f"connecting to rank 0 at {address[0]}:{address[1]}"):
        return dist.TCPStore(*address, num_ranks, is_master=False, timeout=timedelta(seconds=timeout_s))


@dataclass(frozen=True)
class ProcessGroups:
    """What joins the ranks: `data` for tensors of the forward pass, `control` for small host-side agreements."""

    rank: int
    size: int
    data: dist.ProcessGroup  # NCCL on GPUs, gloo on CPUs
    control: dist.ProcessGroup  # gloo
    host: HostLink | None = None  # where all ranks share a host, and can share memory

    @classmethod
    def join(
        cls,
        store: dist.Store,
        rank: int,
        size: int,
        node_ip: str,
        device: torch.device,
        timeout_s: float,
        same_host: bool = False,
    ) -> ProcessGroups:
        """Join all ranks; returns when every one is there.

        Args:
            same_host: all ranks run on one host: join them by shared memory too, where that can be had.

        Raises:
            PeerLostError: not all came within `timeout_s` seconds.
        """
        _use_interface_of(node_ip)
        timeout = timedelta(seconds=timeout_s)
        on_gpu = device.type == "cuda"
        if on_gpu and device.index is None:
            # torch binds NCCL to no device without an index.
            device = torch.device("cuda", torch.cuda.current_device())
        with collective("joining the process group"):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=device if on_gpu else None,
            )
            data = dist.group.WORLD
            assert data is not None
            control = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else data
        groups = cls(rank, size, data, control)
        if not same_host:
            return groups
        try:
            return dataclasses.replace(groups, host=HostLink.join(rank, size, groups.agree, timeout_s))
        except LinkUnavailableError as error:
            if rank == 0:
                logger.warning("the ranks share a host but not memory, so gloo joins them, slower: %s", error)
            return groups

    def agree(self, values: list[int]) -> list[list[int]]:
        """Every rank's `values` (the same number of whole numbers on each), in rank order."""
        if self.host is not None and len(values) <= MAX_VALUES:
            return self.host.agree(values)
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = torch.empty(self.size * len(values), dtype=torch.int64)
        with collective("the agreement before a step"):
            dist.all_gather_single(everyone, mine, group=self.control)
        return everyone.view(self.size, -1).tolist()

    def leave(self) -> None:
        """End the groups; safe after a failure."""
        if self.host is not None:
            self.host.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _use_interface_of(node_ip: str) -> None:
    """Have gloo and NCCL listen where other nodes reach this one.

    Left alone, gloo resolves the host's name, which on many machines is a loopback address, and a rank on
    another node then waits for ever.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == node_ip for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            return
