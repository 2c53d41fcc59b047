"""Scheduler, caches and model together: prefix hits, preemption and chunking never change a token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moe_models.interfaces import CausalLM
from tests.checkpoints import load_reference, make_checkpoint, reference_greedy
from tests.models.model_harness import load_model
from tests.runtime.local_rank import LocalRank

VOCAB = 257


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, max_position_embeddings=4096)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CausalLM:
    return load_model(checkpoint)


def draw(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


# Beginnings that are shared to the block, in the middle of one, wholly, and not at all.
PROMPTS = [
    draw(1, 100),
    draw(1, 100) + draw(2, 30),
    draw(1, 70) + draw(3, 33),
    draw(4, 65),
    draw(1, 100),
    draw(1, 64) + draw(5, 1),
    draw(6, 1),
    draw(1, 70) + draw(7, 5),
]
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> list[list[int]]:
    """What transformers says to each of PROMPTS."""
    reference = load_reference(checkpoint)
    return [reference_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("chunk", "interval", "limits"),
    [
        (256, 128, {}),
        (256, 16, {}),
        (37, 48, {}),
        (7, 16, {"slots": 5}),
        (256, 32, {"enable_prefix_caching": False}),
        (64, 32, {"blocks": 12, "slots": 6}),
        (20, 16, {"blocks": 10, "slots": 4, "enable_prefix_caching": False}),
    ],
)
def test_tokens_are_those_of_transformers(
    model: CausalLM, greedy: list[list[int]], chunk: int, interval: int, limits: dict[str, int]
) -> None:
    rank = LocalRank(
        model,
        max_num_batched_tokens=chunk,
        state_checkpoint_interval=interval,
        max_model_len=160,
        **limits,
    )
    for round_ in range(2):  # the second one finds what the first one left
        sequences = [
            rank.add(f"{round_} {index}", prompt, NUM_TOKENS) for index, prompt in enumerate(PROMPTS)
        ]
        rank.run()
        assert [s.output_ids for s in sequences] == greedy
    stats = rank.scheduler.stats
    assert (stats.prefix_hit_tokens > 300) == limits.get("enable_prefix_caching", True)
    if "blocks" in limits:
        assert stats.preemptions > 0
        assert stats.block_evictions > 0 or "enable_prefix_caching" in limits
    assert stats.checkpoint_evictions > 0 or "slots" not in limits or "enable_prefix_caching" in limits


def test_seeded_samples_do_not_depend_on_the_caches(model: CausalLM) -> None:
    outputs = []
    for limits in ({"enable_prefix_caching": False}, {}, {"blocks": 13, "max_num_batched_tokens": 50}):
        rank = LocalRank(model, max_model_len=200, **limits)  # type: ignore[arg-type]
        sequences = [
            rank.add(str(index), prompt, NUM_TOKENS, sample=sample, temperature=0.8, top_k=20)
            for index, prompt in enumerate(PROMPTS)
            for sample in range(2)
        ]
        rank.run()
        outputs.append([s.output_ids for s in sequences])
    assert rank.scheduler.stats.preemptions > 0
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_second_request_that_shares_1024_tokens_computes_few_of_them(
    checkpoint: Path, model: CausalLM
) -> None:
    rank = LocalRank(model, max_model_len=4096, max_num_batched_tokens=2048)
    shared = draw(1, 1024)
    prompts = [shared + draw(2, 77), shared + draw(3, 45)]
    first = rank.add("first", prompts[0], 6)
    assert rank.run() == 1024 + 77 + 5
    second = rank.add("second", prompts[1], 6)
    assert rank.run() <= 128 + 45 + 5
    assert rank.scheduler.stats.prefix_hit_tokens >= 1024 - 128
    reference = load_reference(checkpoint)
    for sequence, prompt in zip((first, second), prompts, strict=True):
        assert sequence.output_ids == reference_greedy(reference, prompt, 6)


def test_a_chat_turn_computes_its_new_tokens_and_at_most_a_block(checkpoint: Path, model: CausalLM) -> None:
    rank, reference = LocalRank(model), load_reference(checkpoint)
    conversation = draw(1, 75)
    for turn in range(3):
        sequence = rank.add(str(turn), conversation, 13)
        computed = rank.run()
        assert computed <= 12 + (75 if turn == 0 else 22 + 16)
        assert sequence.output_ids == reference_greedy(reference, conversation, 13)
        conversation = sequence.token_ids + draw(turn + 2, 22)


def test_samples_compute_their_prompt_once(model: CausalLM) -> None:
    prompt = draw(8, 200)
    alone = LocalRank(model)
    expected = [
        alone.add(f"alone {sample}", prompt, 9, sample=sample, temperature=0.9) for sample in range(3)
    ]
    for sequence in expected:
        assert sequence.num_cached_tokens == 0
    alone.run()
    rank = LocalRank(model, max_num_batched_tokens=64)
    samples = [rank.add("together", prompt, 9, sample=sample, temperature=0.9) for sample in range(3)]
    # The last block of the prompt, whose boundary leaves eight tokens, is all that the others compute again.
    assert rank.run() == 200 + 2 * 8 + 3 * 8
    assert [s.output_ids for s in samples] == [s.output_ids for s in expected]
    assert len({tuple(s.output_ids) for s in samples}) > 1


def test_prompt_logprobs_are_reported_once_whatever_happens(model: CausalLM) -> None:
    prompt = draw(9, 90)
    alone = LocalRank(model)
    sequence = alone.add("a", prompt, 4, prompt_logprobs=2)
    alone.run()
    wanted = alone.prompt_logprobs[sequence]
    assert len(wanted) == 89

    rank = LocalRank(model, max_num_seqs=1, max_num_batched_tokens=25, policy="priority")
    rank.add("before", prompt, 4)
    rank.run()
    again = rank.add("again", prompt, 4, prompt_logprobs=2, priority=1)
    rank.step()
    rank.step()
    rank.add("urgent, in the middle of its prompt", draw(1, 5), 1)
    rank.run()
    assert (again.num_preemptions, again.num_cached_tokens) == (1, 0)
    found = rank.prompt_logprobs[again]
    assert len(found) == 89
    for ours, theirs in zip(found, wanted, strict=True):
        assert list(ours) == list(theirs)
        assert [value for value, _ in ours.values()] == pytest.approx(
            [v for v, _ in theirs.values()], abs=1e-4
        )
    assert again.output_ids == sequence.output_ids
