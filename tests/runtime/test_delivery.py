"""Delivery: tokens go to their driver in columns, whatever has more to say as a delta of its own."""

from __future__ import annotations

import pytest

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.delivery import Delivery
from moe_runtime.modelfiles import resolve_model
from moe_runtime.request import EngineRequest, OutputDelta, SamplingParams
from moe_runtime.runner import StepResult
from moe_runtime.scheduler import Scheduler, SchedulerConfig
from moe_runtime.tokenizer import Tokenizer, load_tokenizer

TEXT = "tokens are sent, naïvely or not: 東京 ✓"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


def _scheduler() -> Scheduler:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, block_size=4, max_model_len=256)
    return Scheduler(config, BlockAllocator(300, 4), SlotAllocator(9))


def _run(
    tokenizer: Tokenizer, params: dict[str, SamplingParams], token_ids: list[int]
) -> dict[str, list[OutputDelta]]:
    """Every request, each of a driver of its own name, gets the same tokens; the deltas by driver."""
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    for name, wanted in params.items():
        request = EngineRequest(
            request_id=f"request-{name}", sample_index=0, prompt_token_ids=(5, 6), params=wanted, seed=0
        )
        delivery.open(scheduler.add(request), name, 0.0)
    found: dict[str, list[OutputDelta]] = {name: [] for name in params}
    for token_id in token_ids:
        step = scheduler.schedule()
        sampled = [token_id] * len(step.sampled)
        scheduler.update(step, sampled)
        delivery.take(scheduler, step, StepResult(sampled, [None] * len(sampled), {}))
        for driver, message in delivery.drain().items():
            found[driver] += message.all()
    return found


def test_columns_and_deltas_carry_the_same_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(TEXT)
    params = {
        "columns": SamplingParams(max_tokens=len(token_ids)),
        "deltas": SamplingParams(max_tokens=len(token_ids), stop=["never there"]),
    }
    for _ in range(2):  # the second time the tokenizer knows the tokens' texts
        found = _run(tokenizer, params, token_ids)
        for driver, deltas in found.items():
            assert "".join(delta.text for delta in deltas) == TEXT
            assert [token for delta in deltas for token in delta.new_token_ids] == token_ids
            assert {delta.request_id for delta in deltas} == {f"request-{driver}"}
            assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_a_step_goes_in_columns_but_for_sequences_with_more_to_say(tokenizer: Tokenizer) -> None:
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    for name, params in (
        ("plain", SamplingParams(max_tokens=9)),
        ("stops", SamplingParams(max_tokens=9, stop=["never there"])),
        ("ends", SamplingParams(max_tokens=2)),
    ):
        request = EngineRequest(
            request_id=name, sample_index=0, prompt_token_ids=(5, 6), params=params, seed=0
        )
        delivery.open(scheduler.add(request), "driver", 0.0)
    for sampled in ([70, 71, 72], [73, 74, 75]):
        delivery.drain()
        step = scheduler.schedule()
        scheduler.update(step, sampled)
        delivery.take(scheduler, step, StepResult(sampled, [None] * 3, {}))
    message = delivery.drain()["driver"]

    assert (message.tokens.request_ids, message.tokens.token_ids) == (["plain"], [73])
    assert [(d.request_id, d.new_token_ids, d.finish_reason) for d in message.deltas] == [
        ("stops", (74,), None),
        ("ends", (75,), "length"),
    ]
    assert delivery.drain() == {}


def test_a_request_that_is_aborted_ends_with_what_came_before(tokenizer: Tokenizer) -> None:
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    request = EngineRequest(
        request_id="r", sample_index=0, prompt_token_ids=(5,), params=SamplingParams(), seed=0
    )
    delivery.open(scheduler.add(request), "driver", 0.0)
    for sequence in scheduler.abort("r"):
        delivery.end(sequence)
    message = delivery.drain()["driver"]
    assert [(d.request_id, d.new_token_ids, d.finish_reason) for d in message.all()] == [("r", (), "abort")]
    assert [d.num_cached_tokens for d in message.all()] == [None]


def test_the_first_piece_tells_the_time_in_the_queue_and_what_was_cached_and_no_other_does(
    tokenizer: Tokenizer,
) -> None:
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    request = EngineRequest(
        request_id="r", sample_index=0, prompt_token_ids=(5,), params=SamplingParams(max_tokens=3), seed=0
    )
    sequence = scheduler.add(request)
    delivery.open(sequence, "driver", 10.0)
    told = []
    for now in (12.5, 20.0, 30.0):
        step = scheduler.schedule()
        sequence.num_cached_tokens = 7  # of a replayed one: some of its output was found too
        delivery.begin(step.chunks, now)
        scheduler.update(step, [70])
        delivery.take(scheduler, step, StepResult([70], [None], {}))
        told += [(d.time_in_queue, d.num_cached_tokens) for d in delivery.drain()["driver"].all()]
    assert told == [(2.5, 1), (None, None), (None, None)]


def _add(scheduler: Scheduler, delivery: Delivery, name: str, interval: int, max_tokens: int) -> None:
    request = EngineRequest(
        request_id=name,
        sample_index=0,
        prompt_token_ids=(5, 6),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        stream_interval=interval,
    )
    delivery.open(scheduler.add(request), "driver", 0.0)


def _step(scheduler: Scheduler, delivery: Delivery, token_id: int) -> dict[str, tuple[int, ...]]:
    """A step in which every sequence gets this token; the tokens that are delivered then, by request."""
    step = scheduler.schedule()
    sampled = [token_id] * len(step.sampled)
    scheduler.update(step, sampled)
    delivery.take(scheduler, step, StepResult(sampled, [None] * len(sampled), {}))
    return {
        delta.request_id: delta.new_token_ids
        for message in delivery.drain().values()
        for delta in message.all()
    }


def test_with_an_interval_tokens_come_together_after_the_first(tokenizer: Tokenizer) -> None:
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    _add(scheduler, delivery, "a", 4, 10)
    found = [_step(scheduler, delivery, 70 + i).get("a") for i in range(10)]
    assert found == [(70,), None, None, None, (71, 72, 73, 74), None, None, None, (75, 76, 77, 78), (79,)]


def test_what_waits_goes_along_with_any_message_to_its_driver(tokenizer: Tokenizer) -> None:
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    _add(scheduler, delivery, "a", 16, 9)
    found = [_step(scheduler, delivery, 70 + i) for i in range(3)]
    _add(scheduler, delivery, "b", 16, 4)
    found += [_step(scheduler, delivery, 80 + i) for i in range(6)]
    assert found[:3] == [{"a": (70,)}, {}, {}]
    assert found[3:] == [
        {"a": (71, 72, 80), "b": (80,)},
        {},
        {},
        {"a": (81, 82, 83), "b": (81, 82, 83)},  # b has ended
        {},
        {"a": (84, 85)},
    ]
    assert not delivery.drain()
