"""AsyncLLM: many coroutines on one deployment, aborts, health, and ranks that sleep when there is no work."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import psutil
import pytest

from moe_runtime import AsyncLLM, RequestOutput, SamplingParams
from moe_runtime.errors import ConfigError, EngineDeadError, PromptError, QueueFullError, RankFailedError
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.observer import NoObserver

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

T = TypeVar("T")
LONG = SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True)


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    created = asyncio.new_event_loop()
    yield created
    created.close()


@pytest.fixture(scope="module")
def llm(ray_session: None, loop: asyncio.AbstractEventLoop) -> Iterator[AsyncLLM]:
    started = loop.run_until_complete(AsyncLLM.start(expert_parallel_size=2, dtype="float32"))
    yield started
    loop.run_until_complete(started.shutdown())


def _run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    return loop.run_until_complete(asyncio.wait_for(coroutine, 60))


async def _last(llm: AsyncLLM, prompt: Any, params: SamplingParams) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, params)]
    return outputs[-1]


async def _idle(llm: AsyncLLM) -> None:
    while not llm.is_idle or any(
        stats.scheduler["num_running"] + stats.scheduler["num_waiting"] for stats in await llm.stats()
    ):
        await asyncio.sleep(0.01)


def test_outputs_grow_and_many_requests_at_once_get_what_each_gets_alone(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop
) -> None:
    prompts = [[i + 1, 2 * i + 3, 7] * (i + 1) for i in range(12)]

    async def alone() -> list[RequestOutput]:
        return [await _last(llm, prompt, _greedy(10)) for prompt in prompts]

    async def together() -> list[RequestOutput]:
        return await asyncio.gather(*(_last(llm, prompt, _greedy(10)) for prompt in prompts))

    async def lengths() -> list[int]:
        return [len(output.outputs[0].token_ids) async for output in llm.generate([1, 2, 3], _greedy(10))]

    expected = [output.outputs[0].token_ids for output in _run(loop, alone())]
    assert [output.outputs[0].token_ids for output in _run(loop, together())] == expected
    grown = _run(loop, lengths())
    assert grown == sorted(grown)
    assert grown[-1] == 10
    assert len(grown) > 3  # tokens came one by one, not all at the end


def test_requests_are_spread_over_the_ranks(llm: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
    async def run() -> list[int]:
        before = [stats.loop["generation_tokens"] for stats in await llm.stats()]
        await asyncio.gather(*(_last(llm, [i + 1], _greedy(6)) for i in range(8)))
        after = [stats.loop["generation_tokens"] for stats in await llm.stats()]
        return [int(b - a) for a, b in zip(before, after, strict=True)]

    assert _run(loop, run()) == [24, 24]


def test_abort_by_id_and_by_leaving_end_the_request_on_the_rank(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop
) -> None:
    async def by_id() -> str | None:
        reason = None
        async for output in llm.generate([1, 2], LONG, request_id="mine"):
            reason = output.outputs[0].finish_reason
            if reason is None:
                await llm.abort("mine")
        await _idle(llm)
        return reason

    async def by_leaving() -> None:
        async for _ in llm.generate([1, 2], LONG):
            break
        await _idle(llm)

    async def by_cancelling() -> None:
        task = asyncio.create_task(_last(llm, [1, 2], LONG))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _idle(llm)

    async def in_prefill() -> None:
        task = asyncio.create_task(_last(llm, [5] * 4000, LONG))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _idle(llm)

    assert _run(loop, by_id()) == "abort"
    for scenario in (by_leaving, by_cancelling, in_prefill):
        _run(loop, scenario())
    _run(loop, llm.abort("never existed"))


def test_bad_requests_fail_alone(llm: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
    async def twice() -> None:
        async for _ in llm.generate([1], LONG, request_id="same"):
            await _last_with_id(llm, "same")

    with pytest.raises(ConfigError, match="'same' is in flight already"):
        _run(loop, twice())
    with pytest.raises(PromptError, match="outside the vocabulary"):
        _run(loop, _last(llm, [99999], _greedy(1)))
    assert _run(loop, _last(llm, [1], _greedy(1))).finished
    _run(loop, llm.check_health())


async def _last_with_id(llm: AsyncLLM, request_id: str) -> None:
    async for _ in llm.generate([1], _greedy(1), request_id=request_id):
        pass


def test_parked_ranks_take_next_to_no_cpu_and_wake_at_once(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop
) -> None:
    _run(loop, _idle(llm))
    ranks = [psutil.Process(report.pid) for report in llm.ranks]
    before = [sum(rank.cpu_times()[:2]) for rank in ranks]
    steps = [stats.loop["steps"] for stats in _run(loop, llm.stats())]
    time.sleep(2)
    used = [sum(rank.cpu_times()[:2]) - b for rank, b in zip(ranks, before, strict=True)]
    assert max(used) < 0.1, f"parked ranks used {used} s of CPU in 2 s"
    assert [stats.loop["steps"] for stats in _run(loop, llm.stats())] == steps
    assert _run(loop, _last(llm, [1], _greedy(2))).finished


def test_metrics_count_what_real_ranks_did(llm: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
    metrics = DeploymentMetrics.of(llm.deployment, model_name="demo")

    def values() -> dict[str, float]:
        """Every series summed over its labels."""
        found: Counter[str] = Counter()
        for family in metrics.registry.collect():
            for sample in family.samples:
                found[sample.name.removeprefix("moe_runtime:")] += sample.value
        return found

    async def run() -> list[RequestOutput]:
        return await asyncio.gather(*(_last(llm, [i + 1, 3, 5], _greedy(6)) for i in range(4)))

    _run(loop, _idle(llm))
    before = values()
    llm.observe(metrics.observer)
    outputs = _run(loop, run())
    llm.observe(NoObserver())
    _run(loop, _idle(llm))
    metrics._sampler._asked_at = None  # not so soon again, but for this
    grown = {name: value - before[name] for name, value in values().items()}

    assert grown["generation_tokens_total"] == grown["request_generation_tokens_sum"] == 24
    assert grown["request_success_total"] == grown["time_to_first_token_seconds_count"] == 4
    assert grown["inter_token_latency_seconds_count"] == 20
    model = llm.deployment.plan.info
    assert (
        grown["expert_tokens_total"]
        == len(model.moe_layers) * model.num_experts_per_tok * grown["iteration_tokens_total_sum"]
    )
    assert 0 < grown["request_queue_time_seconds_sum"] < grown["e2e_request_latency_seconds_sum"]
    for stats in _run(loop, llm.stats()):
        assert all(seconds > 0 for seconds in stats.step_parts.values())
    assert sum(map(sum, metrics.load_snapshot()["tokens"])) == grown["expert_tokens_total"]
    for output in outputs:
        times = output.metrics
        assert times is not None
        assert times.arrival_time < times.first_token_time < times.finished_time  # type: ignore[operator]
        assert times.time_in_queue is not None


def test_bursts_of_requests_leave_nothing_behind(llm: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
    ranks = [psutil.Process(report.pid) for report in llm.ranks]

    async def burst() -> list[int]:
        outputs = await asyncio.gather(
            *(_last(llm, [i % 900 + 1, 5], _greedy(1 + i % 3)) for i in range(1000))
        )
        assert [len(o.outputs[0].token_ids) for o in outputs] == [1 + i % 3 for i in range(1000)]
        await _idle(llm)
        for stats in await llm.stats():
            assert (stats.scheduler["blocks_used"], stats.scheduler["slots_used"]) == (0, 0)
        return [rank.memory_info().rss for rank in ranks]

    # The first burst grows pools and caches to their size; the second finds them there.
    first = loop.run_until_complete(asyncio.wait_for(burst(), 240))
    second = loop.run_until_complete(asyncio.wait_for(burst(), 240))
    assert all(after - before < 32e6 for before, after in zip(first, second, strict=True)), (first, second)


@pytest.mark.slow
def test_a_full_queue_refuses_what_comes_then_and_serves_the_rest(
    ray_session: None, loop: asyncio.AbstractEventLoop
) -> None:
    async def scenario() -> None:
        llm = await AsyncLLM.start(max_num_seqs=1, max_waiting=2)
        try:
            requests = [_last(llm, [i + 1], _greedy(200)) for i in range(8)]
            results = await asyncio.gather(*requests, return_exceptions=True)
        finally:
            await llm.shutdown()
        refused = [result for result in results if isinstance(result, QueueFullError)]
        served = [result for result in results if isinstance(result, RequestOutput)]
        assert len(refused) + len(served) == 8
        assert 1 <= len(refused) <= 6
        assert "2" in str(refused[0])
        assert all(len(output.outputs[0].token_ids) == 200 for output in served)

    _run(loop, scenario())


def test_the_death_of_a_rank_ends_every_request_with_its_name(
    ray_session: None, loop: asyncio.AbstractEventLoop
) -> None:
    async def scenario() -> None:
        llm = await AsyncLLM.start(expert_parallel_size=3)
        requests = [asyncio.create_task(_last(llm, [i + 1], LONG)) for i in range(6)]
        await asyncio.sleep(0.5)
        died = time.monotonic()
        os.kill(llm.ranks[1].pid, signal.SIGKILL)
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert time.monotonic() - died < 10
        for result in results:
            assert isinstance(result, RankFailedError)
            assert "rank 1 (node" in str(result)
        with pytest.raises(EngineDeadError, match="rank 1"):
            await _last(llm, [1], LONG)
        with pytest.raises(EngineDeadError):
            await llm.check_health()
        await llm.shutdown()

    _run(loop, scenario())
