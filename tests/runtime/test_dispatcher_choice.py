"""A deployment's dispatchers: ranks of one node share memory unless told otherwise, and all give the same tokens."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from moe_runtime import LLM, SamplingParams
from moe_runtime.errors import RankFailedError
from tests.runtime.host_ranks import holders_of_link_memory

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

EP_SIZE = 3
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def _prompts() -> list[list[int]]:
    """Of such lengths that some ranks are done long before others, and take part without tokens."""
    draw = random.Random(3)
    return [[draw.randrange(1000) for _ in range(length)] for length in (70, 3, 11, 1)]


def _await_no_holder_among(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while pids & holders_of_link_memory():
        assert time.monotonic() < deadline, "shared memory outlived the deployment"
        time.sleep(0.05)


@pytest.mark.slow  # test_dispatch.py has them without ranks
def test_every_dispatcher_gives_the_same_tokens() -> None:
    tokens = {}
    for kind in ("auto", "all_gather", "all_to_all"):
        # 40 tokens a step: the long prompt comes in chunks.
        with LLM(
            expert_parallel_size=EP_SIZE,
            dispatcher=kind,
            dtype="float32",
            max_num_seqs=8,
            max_num_batched_tokens=40,
            use_tqdm=False,
        ) as llm:
            pids = {rank.pid for rank in llm.ranks}
            chosen = "shared_memory" if kind == "auto" else kind
            assert all(rank.dispatcher.startswith(chosen) for rank in llm.ranks)
            assert pids <= holders_of_link_memory()  # agreements go through it in any case
            outputs = llm.generate(_prompts(), PARAMS, use_tqdm=False)
            tokens[kind] = [output.outputs[0].token_ids for output in outputs]
        _await_no_holder_among(pids)
    assert tokens["auto"] == tokens["all_gather"] == tokens["all_to_all"]


def test_a_killed_rank_is_named_and_leaves_no_memory_behind() -> None:
    with LLM(expert_parallel_size=EP_SIZE, dtype="float32", use_tqdm=False) as llm:
        pids = [rank.pid for rank in llm.ranks]
        stream = llm.stream(_prompts()[0], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        next(stream)
        os.kill(pids[1], signal.SIGKILL)
        start_s = time.monotonic()
        with pytest.raises(RankFailedError, match=rf"rank 1 \(node .*, pid {pids[1]}\) died"):
            for _ in stream:
                pass
        assert time.monotonic() - start_s < 10
    _await_no_holder_among(set(pids))
