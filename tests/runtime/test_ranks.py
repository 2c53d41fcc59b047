"""The rank actors: what one of them does wrong ends all of them, quickly, with an error that names it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from moe_runtime.cluster import Placement
from moe_runtime.errors import CheckpointError, MoeRuntimeError, PlacementError, RankFailedError
from moe_runtime.ranks import Ranks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SIZE = 3
FAILING = 1


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    placement = Placement.reserve(SIZE, "cpu", timeout_s=30)
    started = Ranks(
        placement, "cpu", "tests.runtime.faulty_worker:FaultyWorker", [(rank, SIZE) for rank in range(SIZE)]
    )
    started.locate()
    started.call("join", started.call_one(0, "host_store"))
    yield started
    started.kill()


def _work(ranks: Ranks, how: str) -> list[tuple[int, int]]:
    return list(ranks.stream("work", [(FAILING, how)] * SIZE))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_items_of_all_ranks_arrive_with_their_rank(ranks: Ranks) -> None:
    assert sorted(_work(ranks, "nothing")) == [(rank, 3) for rank in range(SIZE)]


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        (
            "raise",
            RankFailedError,
            r"rank 1 \(node 127.0.0.1, pid \d+\) failed: ZeroDivisionError: a kernel went",
        ),
        ("kill", RankFailedError, r"rank 1 \(node 127.0.0.1, pid \d+\) died"),
        ("exit", RankFailedError, r"rank 1 \(node 127.0.0.1, pid \d+\) died"),
        ("user error", CheckpointError, r"model.safetensors is truncated"),
    ],
)
def test_a_failing_rank_ends_all_and_is_named(
    ranks: Ranks, how: str, error: type[MoeRuntimeError], words: str
) -> None:
    pids = [address.pid for address in ranks.locate()]
    start = time.monotonic()
    with pytest.raises(error, match=words):
        _work(ranks, how)
    assert time.monotonic() - start < 10
    while any(map(_alive, pids)):  # the processes end a moment after Ray is told to kill them
        assert time.monotonic() - start < 10, "a rank outlived the failure"
        time.sleep(0.05)


def test_more_gpus_than_the_cluster_has_are_refused_with_what_it_has() -> None:
    with pytest.raises(PlacementError, match=r"needs 4 GPUs, the cluster has 0 \(.*: 2 CPU, no GPU\)"):
        Placement.reserve(4, "cuda", timeout_s=5)
