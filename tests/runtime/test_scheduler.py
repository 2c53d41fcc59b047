"""The scheduler: order, chunks, limits, priorities and preemption, step by step and without prefix caching."""

from __future__ import annotations

import pytest

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.errors import ConfigError, PromptError, QueueFullError
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.scheduler import ScheduledStep, Scheduler, SchedulerConfig, SequenceStatus

EOS = 0


def request(
    name: str, prompt: int, max_tokens: int | None = 4, sample: int = 0, priority: int = 0, **params: object
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        sample_index=sample,
        prompt_token_ids=tuple(range(1, prompt + 1)),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=1,
        eos_token_ids=(EOS,),
        priority=priority,
    )


def make(
    seqs: int = 4,
    tokens: int = 8,
    blocks: int = 100,
    length: int = 64,
    slots: int | None = None,
    **rest: object,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=4,
        max_model_len=length,
        enable_prefix_caching=False,
        **rest,  # type: ignore[arg-type]
    )
    return Scheduler(config, BlockAllocator(blocks + 1, 4), SlotAllocator((slots or seqs) + 1))


def shown(step: ScheduledStep) -> list[tuple[str, int, int, bool]]:
    return [(e.sequence.request.request_id, e.start, e.num_tokens, e.needs_logits) for e in step.entries]


def run(scheduler: Scheduler, token: int = 7) -> list[tuple[str, int, int, bool]]:
    """One whole step in which every sequence samples `token`."""
    step = scheduler.schedule()
    entries = shown(step)
    scheduler.update(step, [token] * len(step.sampled))
    return entries


def test_prompt_is_computed_in_chunks_and_only_the_last_one_yields_logits() -> None:
    scheduler = make(tokens=8)
    sequence = scheduler.add(request("a", prompt=19, max_tokens=2))
    assert run(scheduler) == [("a", 0, 8, False)]
    assert run(scheduler) == [("a", 8, 8, False)]
    assert sequence.output_ids == []
    assert run(scheduler) == [("a", 16, 3, True)]
    assert sequence.output_ids == [7]
    assert run(scheduler) == [("a", 19, 1, True)]
    assert sequence.output_ids == [7, 7]
    assert sequence.token_ids == [*range(1, 20), 7, 7]
    assert (sequence.finish_reason, sequence.num_computed) == ("length", 20)
    assert not scheduler.has_work


def test_decodes_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    scheduler = make(tokens=6)
    scheduler.add(request("a", prompt=2, max_tokens=9))
    scheduler.add(request("b", prompt=3, max_tokens=9))
    run(scheduler)
    scheduler.add(request("long", prompt=30))
    for start in (0, 4, 8):
        step = scheduler.schedule()
        assert step.num_decodes == 2
        assert step.num_tokens == 6
        assert shown(step)[2] == ("long", start, 4, False)
        assert [entry[0] for entry in shown(step)[:2]] == ["a", "b"]
        scheduler.update(step, [7, 7])


def test_several_prompts_share_a_step_and_the_last_is_cut() -> None:
    scheduler = make(tokens=8)
    for name, prompt in (("a", 3), ("b", 3), ("c", 5)):
        scheduler.add(request(name, prompt))
    assert run(scheduler) == [("a", 0, 3, True), ("b", 0, 3, True), ("c", 0, 2, False)]
    assert run(scheduler) == [("a", 3, 1, True), ("b", 3, 1, True), ("c", 2, 3, True)]


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    scheduler = make(blocks=5, tokens=24)
    scheduler.add(request("a", prompt=10, max_tokens=9))  # 3 blocks now
    scheduler.add(request("big", prompt=12, max_tokens=4))  # 3 blocks now: must wait
    scheduler.add(request("small", prompt=2, max_tokens=2))  # 1 block: would fit
    assert run(scheduler) == [("a", 0, 10, True)]
    while scheduler.num_waiting == 2:
        step = run(scheduler)
    assert [entry[0] for entry in step] == ["big", "small"]


def test_a_sequence_takes_blocks_only_for_what_it_computes_now() -> None:
    scheduler = make(tokens=6)
    sequence = scheduler.add(request("a", prompt=13, max_tokens=20))
    held = []
    while sequence.status is not SequenceStatus.FINISHED:
        step = scheduler.schedule()
        held.append(len(sequence.block_table))
        scheduler.update(step, [7] * len(step.sampled))
    assert held == [2, 3, 4, *(-(-tokens // 4) for tokens in range(14, 33))]
    assert scheduler.stats.blocks_used == 0


@pytest.mark.parametrize(("seqs", "slots"), [(2, 4), (4, 2)])
def test_no_more_run_than_max_num_seqs_or_slots_allow(seqs: int, slots: int) -> None:
    scheduler = make(seqs=seqs, slots=slots, tokens=16)
    for name in "abc":
        scheduler.add(request(name, prompt=2))
    run(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


@pytest.mark.parametrize(
    ("params", "tokens", "outputs", "reason", "stop_reason"),
    [
        ({}, [7, EOS], [7, EOS], "stop", None),
        ({"ignore_eos": True}, [EOS] * 4, [EOS] * 4, "length", None),
        ({"stop_token_ids": [9]}, [7, 9], [7, 9], "stop", 9),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, [EOS], [EOS], "stop", EOS),
        ({"min_tokens": 3}, [EOS, EOS, EOS], [EOS, EOS, EOS], "stop", None),
        ({"max_tokens": 1}, [7], [7], "length", None),
        ({"max_tokens": 1}, [EOS], [EOS], "stop", None),
    ],
)
def test_ends(
    params: dict[str, object], tokens: list[int], outputs: list[int], reason: str, stop_reason: int | None
) -> None:
    scheduler = make()
    sequence = scheduler.add(request("a", 3, **{"max_tokens": 4, **params}))  # type: ignore[arg-type]
    for token in tokens:
        assert sequence.status is not SequenceStatus.FINISHED
        run(scheduler, token)
    assert sequence.output_ids == outputs
    assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop_reason)
    assert (scheduler.has_work, sequence.block_table, sequence.state_slot) == (False, [], 0)


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_output_ends_at_the_length_of_the_model(max_tokens: int | None) -> None:
    scheduler = make(length=10)
    sequence = scheduler.add(request("a", prompt=7, max_tokens=max_tokens))
    while scheduler.has_work:
        run(scheduler)
    assert len(sequence.token_ids) == 10
    assert sequence.finish_reason == "length"


def test_stop_string_in_the_last_allowed_token_counts_as_a_stop() -> None:
    scheduler = make()
    sequence = scheduler.add(request("a", prompt=3, max_tokens=1))
    run(scheduler)
    assert sequence.finish_reason == "length"
    scheduler.finish(sequence, "stop", "\n\n")
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "\n\n")


def test_abort_ends_all_samples_wherever_they_are_and_in_mid_step() -> None:
    scheduler = make(seqs=1)
    running = scheduler.add(request("a", prompt=3, sample=0))
    waiting = scheduler.add(request("a", prompt=3, sample=1))
    other = scheduler.add(request("b", prompt=3))
    step = scheduler.schedule()
    assert scheduler.abort("a") == [running, waiting]
    assert scheduler.abort("a") == []
    scheduler.update(step, [7])
    assert running.output_ids == []
    assert {running.finish_reason, waiting.finish_reason} == {"abort"}
    assert run(scheduler) == [("b", 0, 3, True)]
    assert other.output_ids == [7]


def test_an_id_in_flight_is_refused_and_may_be_used_again_later() -> None:
    scheduler = make()
    scheduler.add(request("a", prompt=3))
    with pytest.raises(ConfigError, match=r"request 'a' \(sample 0\) is already in flight"):
        scheduler.add(request("a", prompt=3))
    scheduler.abort("a")
    scheduler.add(request("a", prompt=3))


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make(blocks=4)
    with pytest.raises(
        PromptError, match=r"may reach 17 tokens and needs 5 KV blocks of 4 tokens, but .* has 4;"
    ):
        scheduler.add(request("a", prompt=10, max_tokens=7))
    scheduler.add(request("a", prompt=10, max_tokens=6))
    with pytest.raises(
        PromptError, match=r"prompt of 64 tokens; it must have at least 1 and, .* 64, at most 63"
    ):
        scheduler.add(request("b", prompt=64))
    with pytest.raises(PromptError, match="prompt of 0 tokens"):
        scheduler.add(request("b", prompt=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"policy": "prio"}, "policy must be one of fcfs, priority, got 'prio'; did you mean 'priority'"),
        ({"max_waiting": 0}, r"max_waiting must be at least 1 \(or None for no limit\), got 0"),
        ({"state_checkpoint_share": 1.5}, "state_checkpoint_share must be between 0 and 1, got 1.5"),
        ({"state_checkpoint_interval": 0}, "state_checkpoint_interval must be at least 1, got 0"),
        ({"max_num_batched_tokens": 3}, r"max_num_batched_tokens \(3\) must be at least max_num_seqs \(4\)"),
    ],
)
def test_bad_limits_are_refused(values: dict[str, object], message: str) -> None:
    good = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 4, "max_model_len": 64}
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{**good, **values})  # type: ignore[arg-type]


def test_steps_must_be_updated_one_by_one() -> None:
    scheduler = make()
    scheduler.add(request("a", prompt=3))
    step = scheduler.schedule()
    with pytest.raises(AssertionError, match="not been updated"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="0 tokens for 1 sequences"):
        scheduler.update(step, [])
    scheduler.update(step, [7])
    with pytest.raises(AssertionError, match="scheduled last"):
        scheduler.update(step, [7])


def test_a_full_queue_refuses_with_the_numbers_and_takes_more_later() -> None:
    scheduler = make(seqs=1, max_waiting=2)
    for name in "ab":
        scheduler.add(request(name, prompt=3))
    with pytest.raises(
        QueueFullError, match=r"'c' is refused: 2 sequences wait and the limit is 2; .* raise max_waiting"
    ):
        scheduler.add(request("c", prompt=3))
    run(scheduler)
    scheduler.add(request("c", prompt=3))
    assert scheduler.num_waiting == 2


# --------------------------------------------------------------------------- preemption


def test_the_latest_is_preempted_and_goes_on_with_the_tokens_it_had() -> None:
    scheduler = make(blocks=4, tokens=16)
    first = scheduler.add(request("a", prompt=6, max_tokens=8))
    second = scheduler.add(request("b", prompt=7, max_tokens=8))
    third = scheduler.add(request("c", prompt=2, max_tokens=2))
    assert run(scheduler) == [("a", 0, 6, True), ("b", 0, 7, True)]
    assert run(scheduler) == [("a", 6, 1, True), ("b", 7, 1, True)]
    # b needs a third block, there is none, and b itself came last.
    assert run(scheduler) == [("a", 7, 1, True)]
    assert (second.status, second.num_preemptions) == (SequenceStatus.WAITING, 1)
    assert second.token_ids == [*range(1, 8), 7, 7]
    assert (second.block_table, second.state_slot, second.num_computed) == ([], 0, 0)
    while first.finish_reason is None:
        assert [entry[0] for entry in run(scheduler)] == ["a"]
    # It stands before c, which came later, and computes its tokens once more to sample the next one.
    assert run(scheduler) == [("b", 0, 9, True), ("c", 0, 2, True)]
    while scheduler.has_work:
        run(scheduler)
    assert [len(s.output_ids) for s in (first, second, third)] == [8, 8, 2]
    assert scheduler.stats.preemptions == 1


def test_the_older_one_takes_the_block_of_the_younger() -> None:
    scheduler = make(blocks=4, tokens=16)
    scheduler.add(request("a", prompt=8, max_tokens=8))
    scheduler.add(request("b", prompt=6, max_tokens=8))
    assert run(scheduler) == [("a", 0, 8, True), ("b", 0, 6, True)]
    assert run(scheduler) == [("a", 8, 1, True)]
    assert scheduler.num_waiting == 1


def test_a_prompt_gets_the_blocks_that_are_left_and_waits_for_more() -> None:
    scheduler = make(blocks=7, tokens=16)
    scheduler.add(request("a", prompt=8, max_tokens=4))
    scheduler.add(request("b", prompt=27, max_tokens=1))
    assert run(scheduler) == [("a", 0, 8, True), ("b", 0, 8, False)]
    assert run(scheduler) == [("a", 8, 1, True), ("b", 8, 8, False)]
    # All blocks are taken; b, the latest, keeps what it has until a is done.
    assert run(scheduler) == [("a", 9, 1, True)]
    assert run(scheduler) == [("a", 10, 1, True)]
    assert run(scheduler) == [("b", 16, 11, True)]
    assert scheduler.stats.preemptions == 0


def test_a_prompt_that_gets_no_block_takes_those_of_less_urgent_sequences() -> None:
    scheduler = make(blocks=8, tokens=12, policy="priority")
    low = scheduler.add(request("low", prompt=9, max_tokens=9, priority=1))
    run(scheduler)
    scheduler.add(request("urgent", prompt=28, max_tokens=1, priority=0))
    assert run(scheduler) == [("low", 9, 1, True), ("urgent", 0, 11, False)]
    # Nine tokens fill the five blocks that low leaves.
    assert run(scheduler) == [("low", 10, 1, True), ("urgent", 11, 9, False)]
    assert run(scheduler) == [("urgent", 20, 8, True)]
    assert low.num_preemptions == 1
    assert run(scheduler) == [("low", 0, 12, True)]


# --------------------------------------------------------------------------- priorities


def test_priority_comes_before_arrival_and_equals_keep_their_order() -> None:
    scheduler = make(seqs=1, policy="priority")
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("soon", -1)):
        scheduler.add(request(name, prompt=2, max_tokens=1, priority=priority))
    order = []
    while scheduler.has_work:
        order += [entry[0] for entry in run(scheduler)]
    assert order == ["soon", "first", "second", "late"]


def test_first_come_first_served_ignores_priority() -> None:
    scheduler = make(seqs=1)
    for name, priority in (("a", 5), ("b", 0)):
        scheduler.add(request(name, prompt=2, max_tokens=1, priority=priority))
    assert [run(scheduler)[0][0], run(scheduler)[0][0]] == ["a", "b"]


@pytest.mark.parametrize("limits", [{"seqs": 2}, {"slots": 2}, {"blocks": 4}])
def test_an_urgent_request_takes_the_place_of_the_least_urgent(limits: dict[str, int]) -> None:
    scheduler = make(**{"tokens": 16, **limits}, policy="priority")  # type: ignore[arg-type]
    for name, priority in (("a", 1), ("b", 2)):
        scheduler.add(request(name, prompt=5, max_tokens=3, priority=priority))
    run(scheduler)
    scheduler.add(request("peer", prompt=5, max_tokens=3, priority=2))
    assert [entry[0] for entry in run(scheduler)] == ["a", "b"]
    scheduler.add(request("urgent", prompt=5, max_tokens=3, priority=0))
    assert [entry[0] for entry in run(scheduler)] == ["a", "urgent"]
    assert scheduler.stats.preemptions == 1
    while scheduler.has_work:
        run(scheduler)


def test_an_urgent_request_goes_before_the_rest_of_a_long_prompt() -> None:
    scheduler = make(tokens=8, policy="priority")
    scheduler.add(request("long", prompt=40, max_tokens=1, priority=1))
    assert run(scheduler) == [("long", 0, 8, False)]
    scheduler.add(request("peer", prompt=9, max_tokens=2, priority=1))
    assert run(scheduler) == [("long", 8, 8, False)]
    scheduler.add(request("urgent", prompt=9, max_tokens=2, priority=0))
    assert run(scheduler) == [("urgent", 0, 8, False)]
    assert run(scheduler) == [("urgent", 8, 1, True), ("long", 16, 7, False)]
    assert scheduler.stats.preemptions == 0
