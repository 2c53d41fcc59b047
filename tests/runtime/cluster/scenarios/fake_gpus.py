"""A local Ray that believes in two GPUs, on a machine whose torch has no CUDA: who is given what."""

from __future__ import annotations

import os
import re

import pytest
import ray

from moe_runtime import LLM
from moe_runtime.cluster import Placement
from moe_runtime.errors import PlacementError, UserError
from moe_runtime.ranks import Ranks


class AssignmentReporter:
    """A worker that says which accelerator Ray gave it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def assignment(self) -> tuple[int, list[str], str | None]:
        ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return self._rank, ids, os.environ.get("CUDA_VISIBLE_DEVICES")


def each_rank_gets_one_gpu_of_its_own() -> None:
    placement = Placement.reserve(2, "cuda", timeout_s=30)
    ranks = Ranks(placement, "cuda", "tests.runtime.cluster.scenarios.fake_gpus:AssignmentReporter", [0, 1])
    assignments = ranks.call("assignment")
    ranks.kill()
    assert [rank for rank, _, _ in assignments] == [0, 1]
    assert sorted(ids for _, ids, _ in assignments) == [["0"], ["1"]]
    assert all(visible == ids[0] for _, ids, visible in assignments)


def a_rank_whose_torch_sees_no_gpu_says_so(device: str) -> None:
    wanted = (
        r"rank \d on node [\d.]+ was given GPU [01] by Ray, but its torch \S+ \(built with no CUDA\) sees no "
        r"CUDA device; install a CUDA build of torch and its driver there, or use device='cpu'"
    )
    with pytest.raises(UserError) as raised:
        LLM(expert_parallel_size=2, device=device, use_tqdm=False)
    assert re.fullmatch(wanted, str(raised.value)), str(raised.value)
    assert re.fullmatch(r"raised by rank \d", raised.value.__notes__[0]), (
        "the ranks had not yet said where they run"
    )


def too_many_are_refused_with_what_there_is() -> None:
    for request, words in [
        ({}, r"expert_parallel_size=3 needs 3 GPUs, the cluster has 2 \([\d.]+: 2 CPU, 2 GPU\)"),
        (
            {"expert_parallel_size": 2, "placement_strategy": "STRICT_SPREAD"},
            r"node with GPUs for each of 2 ra",
        ),
    ]:
        with pytest.raises(PlacementError, match=words):
            LLM(**{"expert_parallel_size": 3, "device": "cuda", "use_tqdm": False, **request})


if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False)
    each_rank_gets_one_gpu_of_its_own()
    a_rank_whose_torch_sees_no_gpu_says_so("cuda")
    a_rank_whose_torch_sees_no_gpu_says_so("auto")
    too_many_are_refused_with_what_there_is()
    ray.shutdown()
