"""200 requests of every kind, arriving at random, give the tokens that each gives alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from moe_runtime import AsyncLLM, RequestOutput, SamplingParams
from moe_runtime.outputs import Ledger
from tests.checkpoints import BASE, make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

NUM_REQUESTS = 200
MAX_MODEL_LEN = 192
# A sequence of the longest length takes about 72 KB; with this much more for all ranks they are always short.
ONE_SEQUENCE_BYTES = 75_000
SMALL_CACHE_BYTES = 250_000
# Two tokens whose log-probabilities are this close may change places under another order of summation.
TIE = 1e-3


@dataclass(frozen=True, slots=True)
class _Case:
    prompt: list[int]
    params: SamplingParams
    arrival_s: float


def _cases(seed: int) -> list[_Case]:
    draw = random.Random(seed)
    vocab = BASE["vocab_size"]
    shared = [[draw.randrange(vocab) for _ in range(96)] for _ in range(4)]
    cases = []
    for number in range(NUM_REQUESTS):
        prompt = [draw.randrange(vocab) for _ in range(draw.randint(1, 60))]
        if draw.random() < 0.5:  # a common beginning, as of a system prompt
            prompt = draw.choice(shared)[: draw.choice([32, 48, 96])] + prompt
        greedy = draw.random() < 0.5
        params = SamplingParams(
            temperature=0 if greedy else draw.choice([0.7, 1.0, 1.3]),
            top_p=1.0 if greedy else draw.choice([1.0, 0.9]),
            top_k=0 if greedy else draw.choice([0, 40]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            seed=number,
            n=draw.choice([1, 1, 1, 2]) if not greedy else 1,
            max_tokens=draw.randint(1, 30),
            ignore_eos=draw.random() < 0.5,
            stop_token_ids=[draw.randrange(vocab) for _ in range(3)],
            logprobs=-1,
        )
        cases.append(_Case(prompt, params, draw.random() * 3))
    return cases


async def _last(llm: AsyncLLM, case: _Case) -> RequestOutput:
    ledger = Ledger()
    async for delta in llm.stream({"prompt_token_ids": case.prompt}, case.params, ledger=ledger):
        ledger.apply(delta)
    (output,) = ledger.outputs()
    return output


async def _serve(llm: AsyncLLM, cases: list[_Case]) -> list[RequestOutput]:
    async def at_its_time(case: _Case) -> RequestOutput:
        await asyncio.sleep(case.arrival_s)
        return await _last(llm, case)

    return await asyncio.gather(*map(at_its_time, cases))


def _difference(ours: RequestOutput, alone: RequestOutput) -> str | None:
    """What differs between two outputs of one request, unless a tie explains it."""
    for mine, other in zip(ours.outputs, alone.outputs, strict=True):
        if mine.token_ids == other.token_ids:
            if (mine.finish_reason, mine.stop_reason) != (other.finish_reason, other.stop_reason):
                return f"finish reasons {mine.finish_reason} and {other.finish_reason}"
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(mine.token_ids, other.token_ids, strict=False)) if a != b), None
        )
        if at is None or other.logprobs is None:
            return f"one output is the start of the other: {mine.token_ids} and {other.token_ids}"
        row = other.logprobs[at]
        gap = abs(row[mine.token_ids[at]].logprob - row[other.token_ids[at]].logprob)
        if gap > TIE:
            return f"token {at} is {mine.token_ids[at]}, alone it is {other.token_ids[at]} (gap {gap:.4f})"
    return None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[str, list[RequestOutput]]:
    """The checkpoint, and each request served with nothing else around it and nothing cached from others."""
    path = str(tmp_path_factory.mktemp("stress"))
    make_checkpoint(path, seed=0)

    async def one_by_one() -> list[RequestOutput]:
        llm = await AsyncLLM.start(
            path, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False, threads_per_rank=1
        )
        try:
            return [await _last(llm, case) for case in _cases(1)]
        finally:
            await llm.shutdown()

    return path, asyncio.run(one_by_one())


@pytest.mark.parametrize(
    "ep_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_requests_together_give_what_each_gives_alone(
    ep_size: int, alone: tuple[str, list[RequestOutput]]
) -> None:
    path, expected = alone
    cases = _cases(1)

    async def together() -> tuple[list[RequestOutput], Counter[str]]:
        llm = await AsyncLLM.start(
            path,
            expert_parallel_size=ep_size,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=12,
            max_num_batched_tokens=64,
            threads_per_rank=1,
            state_checkpoint_interval=32,
            kv_cache_memory_bytes=SMALL_CACHE_BYTES // ep_size + ONE_SEQUENCE_BYTES,
        )
        try:
            outputs = await asyncio.wait_for(_serve(llm, cases), 240)
            return outputs, sum((Counter(rank.scheduler) for rank in await llm.stats()), Counter())
        finally:
            await llm.shutdown()

    outputs, stats = asyncio.run(together())
    differences = {
        number: difference
        for number, pair in enumerate(zip(outputs, expected, strict=True))
        if (difference := _difference(*pair))
    }
    assert not differences
    # The caches were small enough for all of this to happen.
    assert stats["preemptions"] > 0
    assert stats["block_evictions"] > 0
    assert stats["prefix_hit_tokens"] > 0
    assert (stats["num_running"], stats["num_waiting"], stats["blocks_used"], stats["slots_used"]) == (
        0,
        0,
        0,
        0,
    )
