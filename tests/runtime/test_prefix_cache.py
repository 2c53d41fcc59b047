"""What a sequence finds of its beginning in the caches, where states are kept, and what is given up first."""

from __future__ import annotations

import pytest

from moe_runtime.scheduler import SequenceStatus
from tests.runtime.fake_rank import BLOCK, FakeRank, expected_output


def text(*seeds_and_lengths: tuple[int, int]) -> list[int]:
    """Tokens in pieces that differ by their seed."""
    return [
        1 + (7 * seed + 3 * i * i + i * seed) % 97
        for seed, length in seeds_and_lengths
        for i in range(length)
    ]


def finish(rank: FakeRank, name: str, prompt: list[int], max_tokens: int = 1, **rest: object) -> int:
    """Run one request to its end; returns how many of its prompt's tokens it found cached."""
    sequence = rank.add(name, prompt, max_tokens, **rest)
    rank.finish_all()
    assert sequence.output_ids == expected_output(sequence.request, sequence.max_tokens)
    return sequence.num_cached_tokens


def checkpoints(rank: FakeRank) -> list[int]:
    """Positions of all kept states, sorted."""

    def depth(node: object) -> int:
        found = 0
        while node.parent is not None:  # type: ignore[attr-defined]
            found += len(node.tokens)  # type: ignore[attr-defined]
            node = node.parent  # type: ignore[attr-defined]
        return found

    return sorted(depth(node) for node in rank.nodes() if node.slot)


@pytest.mark.parametrize(
    ("prompt", "interval", "kept"),
    [
        # The last boundary that leaves a token to compute; what was computed at the end; the interval.
        (text((1, 30)), 100, [28, 30]),
        (text((1, 28)), 100, [24, 28]),
        (text((1, 30)), 8, [8, 16, 24, 28, 30]),
        (text((1, 32)), 16, [16, 28, 32]),
        (text((1, 30)), 10, [12, 24, 28, 30]),  # rounded up to whole blocks
        (text((1, 3)), 8, []),  # less than a block is not worth a slot
    ],
)
@pytest.mark.parametrize("chunk", [4, 10, 64])
def test_where_states_are_kept(prompt: list[int], interval: int, kept: list[int], chunk: int) -> None:
    rank = FakeRank(state_checkpoint_interval=interval, max_num_batched_tokens=chunk)
    finish(rank, "a", prompt)
    assert checkpoints(rank) == kept


@pytest.mark.parametrize(
    ("second", "cached", "cached_without_state"),
    [
        (text((1, 30)), 28, 28),  # the same prompt goes on at its last boundary
        (text((1, 30), (2, 9)), 30, 28),  # a longer one where the first one ended, in the middle of a block
        (text((1, 21), (2, 20)), 16, 20),  # a branch goes on at the last state before it
        (text((1, 7), (2, 20)), 0, 4),
        (text((2, 30)), 0, 0),
        (text((1, 2)), 0, 0),
    ],
)
def test_a_second_prompt_skips_what_is_cached(
    second: list[int], cached: int, cached_without_state: int
) -> None:
    for has_state, wanted in ((True, cached), (False, cached_without_state)):
        rank = FakeRank(state_checkpoint_interval=16, has_state=has_state)
        assert finish(rank, "a", text((1, 30))) == 0
        assert finish(rank, "b", second) == wanted
        stats = rank.scheduler.stats
        assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (30 + len(second), wanted)


def test_a_branch_point_gets_a_state_when_it_is_computed_again() -> None:
    rank = FakeRank(state_checkpoint_interval=100, slots=20)
    shared = text((1, 41))
    assert finish(rank, "a", shared + text((2, 20))) == 0
    # The keys and values of 40 tokens are there, the state is not.
    assert finish(rank, "b", shared + text((3, 20))) == 0
    assert 40 in checkpoints(rank)
    assert finish(rank, "c", shared + text((4, 20))) == 40
    before = rank.num_computed_tokens
    finish(rank, "d", shared + text((5, 20)))
    assert rank.num_computed_tokens - before == 21


def test_a_second_prompt_that_shares_1024_tokens_computes_at_most_an_interval_of_them() -> None:
    rank = FakeRank(
        blocks=800, slots=40, max_model_len=3000, max_num_batched_tokens=700, state_checkpoint_interval=128
    )
    shared = text((1, 1024))
    finish(rank, "a", shared + text((2, 100)))
    assert 1024 - finish(rank, "b", shared + text((3, 100))) <= 128


def test_a_chat_turn_computes_only_its_new_tokens() -> None:
    rank = FakeRank(state_checkpoint_interval=100, max_model_len=400)
    conversation = text((1, 25))
    for turn in range(4):
        sequence = rank.add(str(turn), conversation, 9)
        computed = rank.finish_all()
        # The question, the answer but its last token, and the last token of the answer before.
        assert computed == (25 if turn == 0 else 11 + 1) + 8
        conversation = sequence.token_ids + text((turn + 2, 11))


def test_the_tail_of_a_turn_can_be_continued_twice() -> None:
    rank = FakeRank(state_checkpoint_interval=100)
    first = rank.add("a", text((1, 25)), 5)
    rank.finish_all()
    for seed in (2, 3):
        assert finish(rank, f"b{seed}", first.token_ids + text((seed, 8)), 6) == 29


def test_samples_of_a_request_compute_their_prompt_once() -> None:
    rank = FakeRank(max_num_seqs=4, max_num_batched_tokens=16, state_checkpoint_interval=100)
    prompt = text((1, 42))
    sequences = [rank.add("a", prompt, 5, sample=sample) for sample in range(3)]
    other = rank.add("b", text((2, 6)), 2)
    while sequences[0].num_uncomputed > 1:
        rank.step()
        assert {s.status for s in sequences[1:]} == {SequenceStatus.WAITING}
    # The other request, behind them in the queue, does not wait for them.
    assert other.status is not SequenceStatus.WAITING
    step = rank.step()
    assert [chunk.sequence for chunk in step.chunks] == sequences[1:]
    assert [s.num_cached_tokens for s in sequences] == [0, 40, 40]
    rank.finish_all()
    assert rank.num_computed_tokens == 42 + 4 + 2 * (2 + 4) + 6 + 1


def test_samples_go_on_when_the_first_is_aborted_in_its_prompt() -> None:
    rank = FakeRank(max_num_batched_tokens=8)
    sequences = [rank.add("a", text((1, 30)), 2, sample=sample) for sample in range(3)]
    rank.step()
    rank.scheduler.finish(sequences[0], "abort")
    rank.finish_all()
    assert [s.finish_reason for s in sequences] == ["abort", "length", "length"]


def test_two_that_compute_the_same_at_once_end_up_with_the_same_blocks() -> None:
    rank = FakeRank(max_num_batched_tokens=64)
    first, second = rank.add("a", text((1, 22)), 9), rank.add("b", text((1, 22)), 9)
    rank.step()
    assert first.block_table[:5] == second.block_table[:5]
    assert first.block_table[5] != second.block_table[5]
    assert rank.scheduler.stats.blocks_used == 7


def test_one_that_recomputes_a_cached_path_reads_its_blocks_and_takes_none() -> None:
    rank = FakeRank(state_checkpoint_interval=100, max_num_batched_tokens=16)
    finish(rank, "a", text((1, 41), (2, 20)))
    used = rank.blocks.num_used
    again = rank.add("b", text((1, 41), (3, 20)), 3)
    step = rank.step()
    assert (step.chunks[0].start, step.chunks[0].kv_from) == (0, 40)
    assert rank.blocks.num_used == used
    rank.finish_all()
    assert again.output_ids == expected_output(again.request, again.max_tokens)


@pytest.mark.parametrize(("has_state", "kept"), [(True, 9), (False, 8)])
def test_a_preempted_sequence_finds_what_it_had_computed(has_state: bool, kept: int) -> None:
    rank = FakeRank(blocks=8, max_num_seqs=1, max_model_len=20, has_state=has_state, policy="priority")
    low = rank.add("low", text((1, 7)), 10, priority=1)
    for _ in range(3):
        rank.step()
    assert low.num_computed == 9
    rank.add("urgent", text((2, 9)), 1, priority=0)
    rank.step()
    assert (low.status, low.num_preemptions) == (SequenceStatus.WAITING, 1)
    step = rank.step()
    assert [(c.sequence, c.start) for c in step.chunks] == [(low, kept)]
    rank.finish_all()
    assert low.output_ids == expected_output(low.request, low.max_tokens)


def test_switched_off_nothing_is_kept() -> None:
    rank = FakeRank(enable_prefix_caching=False)
    for name in "ab":
        assert finish(rank, name, text((1, 30)), 5) == 0
    assert rank.blocks.num_used == rank.slots.num_used == 0
    assert rank.num_computed_tokens == 2 * 34


def test_prompt_logprobs_bypass_the_lookup_but_leave_their_prompt_to_others() -> None:
    rank = FakeRank()
    assert finish(rank, "a", text((1, 30)), prompt_logprobs=1) == 0
    assert finish(rank, "b", text((1, 30)), prompt_logprobs=1) == 0
    assert finish(rank, "c", text((1, 30))) == 28


def test_prompt_logprobs_that_were_reported_are_not_computed_again_after_a_preemption() -> None:
    rank = FakeRank(blocks=10, max_model_len=40, max_num_batched_tokens=8, policy="priority", max_num_seqs=1)
    low = rank.add("low", text((1, 30)), 2, priority=1, prompt_logprobs=1)
    rank.step()
    rank.step()
    rank.add("urgent", text((2, 3)), 1, priority=0)
    rank.step()
    assert (low.status, low.num_reported) == (SequenceStatus.WAITING, 16)
    assert rank.step().chunks[0].start == 16
    rank.finish_all()


# --------------------------------------------------------------------------- what is given up


def test_blocks_least_recently_used_go_first_and_from_the_end() -> None:
    rank = FakeRank(blocks=15, max_model_len=60, has_state=False)
    for seed in (1, 2, 1):  # 5 full blocks each; the first is used again
        finish(rank, f"{seed} {rank.num_computed_tokens}", text((seed, 20)))
    finish(rank, "big", text((3, 28)))  # 7 blocks: 5 are free
    assert rank.scheduler.stats.block_evictions == 2
    assert [rank.tree.match(text((seed, 20)), 20).num_tokens for seed in (1, 2)] == [20, 12]


def test_blocks_of_running_sequences_are_never_given_up() -> None:
    rank = FakeRank(blocks=10, max_model_len=40)
    running = rank.add("a", text((1, 18)), 20)
    for seed in range(2, 6):
        rank.step()
        finish_other = rank.add(str(seed), text((seed, 9)), 1)
        while finish_other.finish_reason is None:
            rank.step()
    rank.finish_all()
    assert running.num_preemptions == 0
    assert running.output_ids == expected_output(running.request, running.max_tokens)
    assert rank.scheduler.stats.block_evictions > 0


def test_states_least_recently_used_go_first_and_the_budget_holds() -> None:
    rank = FakeRank(slots=8, state_checkpoint_share=0.5, state_checkpoint_interval=100)
    for seed in (1, 2):
        finish(rank, str(seed), text((seed, 30)))  # states at 28 and 30
    assert finish(rank, "1 again", text((1, 30), (9, 1))) == 30
    # Its own state at 31 took the place of the oldest, that of prompt 1 at 28.
    finish(rank, "3", text((3, 30)))
    stats = rank.scheduler.stats
    assert (stats.slots_cached, stats.checkpoint_evictions) == (4, 3)
    found = [rank.tree.match(text((seed, 30), (8, 9)), 38).num_tokens for seed in (1, 2, 3)]
    assert found == [30, 0, 30]


def test_a_running_sequence_takes_a_state_s_slot_when_none_is_free() -> None:
    rank = FakeRank(slots=2, max_num_seqs=2)
    finish(rank, "a", text((1, 30)))
    assert rank.scheduler.stats.slots_cached == 2
    for name in "bc":
        rank.add(name, text((ord(name), 9)), 3)
    rank.step()
    assert rank.scheduler.stats.slots_used == 2
    rank.finish_all()


def test_the_only_state_becomes_the_slot_of_the_sequence_that_wants_it() -> None:
    rank = FakeRank(slots=1, max_num_seqs=1)
    first = rank.add("a", text((1, 30)), 5)
    rank.finish_all()
    rank.add("b", first.token_ids + text((2, 5)), 3)
    step = rank.step()
    assert step.state_copies == ()
    assert step.chunks[0].start == 34
    rank.finish_all()


def test_no_share_for_states_keeps_none() -> None:
    rank = FakeRank(state_checkpoint_share=0)
    assert [finish(rank, name, text((1, 30))) for name in "ab"] == [0, 0]
    assert rank.slots.num_used == 0
    assert BLOCK * rank.blocks.num_used == 28
