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
        delivery.open(scheduler.add(request), name)
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
        ("ends", SamplingParams(max_tokens=1)),
    ):
        request = EngineRequest(
            request_id=name, sample_index=0, prompt_token_ids=(5, 6), params=params, seed=0
        )
        delivery.open(scheduler.add(request), "driver")
    step = scheduler.schedule()
    scheduler.update(step, [70, 71, 72])
    delivery.take(scheduler, step, StepResult([70, 71, 72], [None] * 3, {}))
    message = delivery.drain()["driver"]

    assert (message.tokens.request_ids, message.tokens.token_ids) == (["plain"], [70])
    assert [(d.request_id, d.new_token_ids, d.finish_reason) for d in message.deltas] == [
        ("stops", (71,), None),
        ("ends", (72,), "length"),
    ]
    assert delivery.drain() == {}


def test_a_request_that_is_aborted_ends_with_what_came_before(tokenizer: Tokenizer) -> None:
    scheduler, delivery = _scheduler(), Delivery(tokenizer)
    request = EngineRequest(
        request_id="r", sample_index=0, prompt_token_ids=(5,), params=SamplingParams(), seed=0
    )
    delivery.open(scheduler.add(request), "driver")
    for sequence in scheduler.abort("r"):
        delivery.end(sequence)
    message = delivery.drain()["driver"]
    assert [(d.request_id, d.new_token_ids, d.finish_reason) for d in message.all()] == [("r", (), "abort")]
