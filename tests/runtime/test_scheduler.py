"""The scheduler: order, chunks and limits step by step, then a state machine that looks for leaks and starvation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.errors import ConfigError, PromptError
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.scheduler import ScheduledStep, Scheduler, SchedulerConfig, Sequence, SequenceStatus

EOS = 0


def request(
    name: str, prompt: int, max_tokens: int | None = 4, sample: int = 0, **params: object
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        sample_index=sample,
        prompt_token_ids=tuple(range(1, prompt + 1)),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=1,
        eos_token_ids=(EOS,),
    )


def make(
    seqs: int = 4, tokens: int = 8, blocks: int = 100, length: int = 64, slots: int | None = None
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, block_size=4, max_model_len=length
    )
    return Scheduler(config, BlockAllocator(blocks + 1, 4), SlotAllocator((slots or seqs) + 1))


def shown(step: ScheduledStep) -> list[tuple[str, int, int, bool]]:
    return [(e.sequence.request.request_id, e.start, e.num_tokens, e.needs_logits) for e in step.entries]


def run(scheduler: Scheduler, token: int = 7) -> list[tuple[str, int, int, bool]]:
    """One whole step in which every sequence samples `token`."""
    step = scheduler.schedule()
    scheduler.update(step, [token] * len(step.sampled))
    return shown(step)


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
    scheduler = make(blocks=5)  # 20 tokens
    scheduler.add(request("a", prompt=4, max_tokens=8))  # 3 blocks
    scheduler.add(request("big", prompt=8, max_tokens=8))  # 4 blocks: must wait
    scheduler.add(request("small", prompt=2, max_tokens=2))  # 1 block: would fit
    assert run(scheduler) == [("a", 0, 4, True)]
    while scheduler.num_waiting == 2:
        step = run(scheduler)
    assert [entry[0] for entry in step] == ["big"]


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
    assert scheduler.abort("a") == [waiting, running]
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
        ({"max_num_batched_tokens": 3}, r"max_num_batched_tokens \(3\) must be at least max_num_seqs \(4\)"),
    ],
)
def test_bad_limits_are_refused(values: dict[str, int], message: str) -> None:
    good = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 4, "max_model_len": 64}
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{**good, **values})


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


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts, stop strings and tokens on a rank that is too small for them."""

    @initialize(seqs=st.integers(1, 4), extra=st.integers(0, 12), blocks=st.integers(5, 14))
    def start(self, seqs: int, extra: int, blocks: int) -> None:
        config = SchedulerConfig(
            max_num_seqs=seqs, max_num_batched_tokens=seqs + extra, block_size=4, max_model_len=20
        )
        self.blocks, self.slots = BlockAllocator(blocks + 1, 4), SlotAllocator(seqs + 1)
        self.scheduler = Scheduler(config, self.blocks, self.slots)
        self.sequences: list[Sequence] = []
        self.step: ScheduledStep | None = None
        self.first_started: list[int] = []  # indices of sequences in the order in which they first ran

    @rule(prompt=st.integers(1, 19), max_tokens=st.integers(1, 20), min_tokens=st.integers(0, 3))
    def add(self, prompt: int, max_tokens: int, min_tokens: int) -> None:
        made = request(str(len(self.sequences)), prompt, max_tokens, min_tokens=min(min_tokens, max_tokens))
        self.sequences.append(self.scheduler.add(made))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        was_live = self.sequences[index].status is not SequenceStatus.FINISHED
        assert len(self.scheduler.abort(str(index))) == was_live

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        decoding = {s for s in self.live() if s.output_ids}
        self.step = self.scheduler.schedule()
        assert self.step.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert bool(self.step.entries) == self.scheduler.has_work
        members = [e.sequence for e in self.step.entries]
        assert len(set(members)) == len(members)
        assert decoding <= set(members[: self.step.num_decodes])
        for entry in self.step.entries:
            s = entry.sequence
            assert entry.start == s.num_computed
            assert entry.num_tokens >= 1
            assert entry.needs_logits == (entry.start + entry.num_tokens == len(s.token_ids))
            assert entry.start + entry.num_tokens <= len(s.block_table) * 4
            if entry.start == 0:
                self.first_started.append(int(s.request.request_id))
        assert self.first_started == sorted(self.first_started)

    @precondition(lambda self: self.step is not None)
    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        assert self.step is not None
        lengths = {e.sequence: len(e.sequence.token_ids) for e in self.step.entries}
        live = [s for s in self.step.sampled if s.status is not SequenceStatus.FINISHED]
        sampled = [data.draw(st.sampled_from([EOS, 5, 6])) for _ in self.step.sampled]
        self.scheduler.update(self.step, sampled)
        for s, before in lengths.items():
            assert len(s.token_ids) == before + (s in live)
        if live and data.draw(st.booleans()):
            self.scheduler.finish(live[0], "stop", "text")
        self.step = None

    def live(self) -> list[Sequence]:
        return [s for s in self.sequences if s.status is SequenceStatus.RUNNING]

    @invariant()
    def nothing_is_shared_or_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        held = [block for s in self.sequences for block in s.block_table]
        slots = [s.state_slot for s in self.sequences if s.state_slot]
        assert len(set(held)) == len(held) == self.blocks.num_used
        assert len(set(slots)) == len(slots) == self.slots.num_used == self.scheduler.num_running
        assert 0 not in held
        for s in self.sequences:
            assert bool(s.block_table) == bool(s.state_slot) == (s.status is SequenceStatus.RUNNING)
            assert (s.finish_reason is not None) == (s.status is SequenceStatus.FINISHED)
            assert s.token_ids == [*s.request.prompt_token_ids, *s.output_ids]
            assert len(s.output_ids) <= (s.request.params.max_tokens or 0)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.step is not None:
            self.scheduler.update(self.step, [5] * len(self.step.sampled))
        work = sum(s.max_tokens for s in self.sequences)
        for _ in range(work):  # every step computes or samples at least one token
            if self.scheduler.has_work:
                run(self.scheduler, 5)
        assert not self.scheduler.has_work
        assert all(s.finish_reason for s in self.sequences)
        assert self.blocks.num_used == self.slots.num_used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
