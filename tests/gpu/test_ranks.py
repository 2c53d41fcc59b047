"""Ranks on GPUs of their own: NCCL groups, both dispatchers, and a deployment beside one of a single rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_runtime import LLM, SamplingParams
from moe_runtime.parallel.groups import ProcessGroups
from tests.runtime.dispatch_steps import check_steps

pytestmark = pytest.mark.gpu


def _rank_main(rank: int, size: int, store_file: str) -> None:
    torch.cuda.set_device(rank)
    # Without an index, as a rank of a deployment has it, which sees no GPU but its own.
    device = torch.device("cuda")
    store = dist.FileStore(store_file, size)
    groups = ProcessGroups.join(store, rank, size, "127.0.0.1", device, timeout_s=60, same_host=True)
    for kind in ("all_to_all", "all_gather"):
        check_steps(kind, groups, device)
    groups.leave()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_dispatcher_gives_the_sum_over_all_ranks_experts(size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, this machine has {torch.cuda.device_count()}")
    mp.start_processes(_rank_main, args=(size, str(tmp_path / "store")), nprocs=size, start_method="spawn")


@pytest.mark.ray
def test_two_ranks_answer_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    prompts = ["The experts of this model", "Once upon a time"]
    params = SamplingParams(temperature=0, max_tokens=16)
    answers = []
    for size in (1, 2):
        with LLM(expert_parallel_size=size, device="cuda", dtype="float32", use_tqdm=False) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]
