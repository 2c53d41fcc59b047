"""Random arrivals, aborts and stops on ranks that are too small: nothing is lost, shared wrongly or starved."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_runtime.scheduler import ScheduledStep, SequenceStatus
from tests.runtime.fake_rank import FakeRank, expected_output

MAX_MODEL_LEN = 40
# Prompts are beginnings of a few texts, with an end of their own: they share prefixes and branch.
TEXTS = [random.Random(text).choices(range(1, 8), k=30) for text in range(3)]
STOP_TOKEN = 3


def check_outputs(rank: FakeRank) -> None:
    """Every sequence gave what it gives alone; an aborted one the beginning of it."""
    for s in rank.sequences:
        alone = expected_output(s.request, s.max_tokens)
        assert s.output_ids == (
            alone if s.finish_reason in ("stop", "length") else alone[: len(s.output_ids)]
        )


class SchedulerMachine(RuleBasedStateMachine):
    """FakeRank checks every read and write of every step, and who holds what after it."""

    @initialize(
        blocks=st.integers(MAX_MODEL_LEN // 4, 24),
        slots=st.integers(1, 8),
        seqs=st.integers(1, 4),
        extra=st.integers(0, 24),
        has_state=st.booleans(),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        interval=st.sampled_from([4, 7, 16, 100]),
        share=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def start(
        self,
        blocks: int,
        slots: int,
        seqs: int,
        extra: int,
        has_state: bool,
        caching: bool,
        policy: str,
        interval: int,
        share: float,
    ) -> None:
        self.rank = FakeRank(
            blocks=blocks,
            slots=slots,
            has_state=has_state,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + extra,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=caching,
            policy=policy,
            state_checkpoint_interval=interval,
            state_checkpoint_share=share,
        )
        self.scheduler = self.rank.scheduler
        self.step: ScheduledStep | None = None
        self.tokens: list[int] = []
        self.num_requests = 0

    @rule(
        text=st.sampled_from(TEXTS),
        common=st.integers(0, 30),
        own=st.lists(st.integers(1, 7), max_size=5),
        max_tokens=st.integers(1, 12),
        samples=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(0, 2),
        stops=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        text: list[int],
        common: int,
        own: list[int],
        max_tokens: int,
        samples: int,
        priority: int,
        stops: bool,
        prompt_logprobs: int | None,
    ) -> None:
        prompt = text[:common] + own or [1]
        params = {"prompt_logprobs": prompt_logprobs, "stop_token_ids": [STOP_TOKEN] if stops else None}
        for sample in range(samples):
            self.rank.add(
                str(self.num_requests), prompt, max_tokens, sample=sample, priority=priority, **params
            )
        self.num_requests += 1

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = str(data.draw(st.integers(0, self.num_requests - 1)))
        live = [s for s in self.rank.sequences if s.request.request_id == name and not s.finish_reason]
        assert self.scheduler.abort(name) == live
        assert all(s.finish_reason == "abort" for s in live)

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule_and_run(self) -> None:
        decoding = [s for s in self.scheduler._queues.running if s.is_decoding]
        step = self.step = self.scheduler.schedule()
        assert step.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert bool(step.num_tokens) == self.scheduler.has_work
        assert self.scheduler.num_running <= self.scheduler.config.max_num_seqs
        members = [entry.sequence for entry in step.entries]
        assert len(set(members)) == len(members)
        # A sequence that decodes gets its token, or has been preempted.
        assert all(s in step.decodes or s.num_preemptions for s in decoding)
        assert [s.order for s in step.decodes] == sorted(s.order for s in step.decodes)
        for entry in step.entries:
            s = entry.sequence
            assert entry.start == s.num_computed
            assert entry.needs_logits == (entry.start + entry.num_tokens == len(s.token_ids))
            if s.request.params.prompt_logprobs is not None and not s.num_preemptions:
                assert s.num_cached_tokens == 0
        self.tokens = self.rank.run(step)

    @precondition(lambda self: self.step is not None)
    @rule(stop_first=st.booleans())
    def update(self, stop_first: bool) -> None:
        assert self.step is not None
        going_on = [s for s in self.step.sampled if s.status is SequenceStatus.RUNNING]
        lengths = [len(s.output_ids) for s in going_on]
        self.scheduler.update(self.step, self.tokens)
        assert [len(s.output_ids) for s in going_on] == [length + 1 for length in lengths]
        if stop_first and going_on:
            # As for a stop string; the request's own reason is overruled, its tokens are not.
            self.scheduler.finish(going_on[0], "abort", "text")
        self.step = None

    @invariant()
    def everything_has_one_owner(self) -> None:
        if not hasattr(self, "rank"):
            return
        self.rank.check()
        for s in self.rank.sequences:
            assert bool(s.state_slot) == (s.status is SequenceStatus.RUNNING)
            assert (s.finish_reason is not None) == (s.status is SequenceStatus.FINISHED)
            assert s.token_ids == [*s.request.prompt_token_ids, *s.output_ids]

    def teardown(self) -> None:
        if not hasattr(self, "rank"):
            return
        if self.step is not None:
            self.scheduler.update(self.step, self.tokens)
        self.rank.finish_all()
        check_outputs(self.rank)
        stats = self.scheduler.stats
        assert (stats.blocks_used, stats.slots_used) == (0, 0)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("has_state", [True, False])
def test_a_crowd_on_a_small_rank_is_preempted_and_evicted_and_ends_right(
    has_state: bool, policy: str
) -> None:
    rank = FakeRank(
        blocks=16,
        slots=6,
        has_state=has_state,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=MAX_MODEL_LEN,
        policy=policy,
    )
    chance = random.Random(5)
    for number in range(60):
        prompt = chance.choice(TEXTS)[: chance.randint(1, 30)] + chance.choices(range(1, 8), k=2)
        rank.add(str(number), prompt, chance.randint(1, 20), priority=chance.randint(0, 2))
        for _ in range(chance.randint(0, 4)):
            rank.step()
        if number % 7 == 0:
            rank.step(during=lambda: rank.scheduler.abort(str(chance.randint(0, 59))))
    rank.finish_all()
    check_outputs(rank)
    stats = rank.scheduler.stats
    assert stats.preemptions >= 5
    assert stats.block_evictions >= 20
    assert stats.prefix_hit_tokens >= 50
    assert stats.checkpoint_evictions >= 10 or not has_state
    assert stats.blocks_used == stats.slots_used == 0
    assert stats.blocks_cached == rank.blocks.num_used
