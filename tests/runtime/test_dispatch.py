"""Every dispatcher gives what one rank with all experts gives: real gloo groups, one process a rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_runtime.errors import PeerLostError
from moe_runtime.parallel.groups import ProcessGroups
from tests.runtime.dispatch_steps import check_steps

CPU = torch.device("cpu")


def _rank_main(rank: int, size: int, store_file: str) -> None:
    store = dist.FileStore(store_file, size)
    groups = ProcessGroups.join(store, rank, size, "127.0.0.1", CPU, timeout_s=60, same_host=True)
    assert groups.host is not None
    check_steps("shared_memory", groups, CPU)
    for kind in ("all_to_all", "all_gather"):
        check_steps(kind, dataclasses.replace(groups, host=None), CPU)
    groups.leave()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_dispatcher_gives_the_sum_over_all_ranks_experts(size: int, tmp_path: Path) -> None:
    mp.start_processes(_rank_main, args=(size, str(tmp_path / "store")), nprocs=size, start_method="spawn")


def test_auto_chooses_by_host_and_by_the_share_of_ranks_that_a_token_touches() -> None:
    from moe_runtime.parallel.dispatch import _choose

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert _choose(2, 10, cpu, False)[0] == "all_gather"
    assert _choose(32, 4, cpu, False)[0] == "all_to_all"
    assert _choose(32, 4, cpu, True)[0] == "shared_memory"
    assert _choose(32, 4, cuda, True)[0] == "all_gather"


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has NCCL, which would look for the GPU")
def test_torch_takes_the_device_that_a_gpu_rank_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch checks the device first, and does so in a build without CUDA too, where NCCL is what is missing."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    with pytest.raises(PeerLostError, match="doesn't have NCCL built in"):
        ProcessGroups.join(store, 0, 1, "127.0.0.1", torch.device("cuda"), timeout_s=5)
    assert not dist.is_initialized()
