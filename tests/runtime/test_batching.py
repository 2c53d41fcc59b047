"""BatchBuilder: every field of a batch follows from the step, whatever rows it keeps between steps."""

from __future__ import annotations

import random

import pytest
import torch

from moe_models.batch import ForwardBatch
from moe_runtime.batching import BatchBuilder
from moe_runtime.scheduler import ScheduledStep
from tests.runtime.fake_rank import BLOCK, FakeRank

CPU = torch.device("cpu")


def check(batch: ForwardBatch, step: ScheduledStep) -> None:
    """Field by field, from the entries."""
    entries = step.entries
    ends = [e.start + e.num_tokens for e in entries]
    spans = [range(e.start, end) for e, end in zip(entries, ends, strict=True)]
    assert batch.token_ids_T.tolist() == [
        e.sequence.token_ids[p] for e, span in zip(entries, spans, strict=True) for p in span
    ]
    assert batch.positions_T.tolist() == [p for span in spans for p in span]
    assert batch.query_lens == tuple(e.num_tokens for e in entries)
    assert batch.context_lens == tuple(e.start for e in entries)
    assert batch.context_lens_B.tolist() == list(batch.context_lens)
    assert batch.cu_seqlens.tolist() == [sum(batch.query_lens[:i]) for i in range(len(entries) + 1)]
    assert batch.state_slots_B.tolist() == [e.sequence.state_slot for e in entries]
    assert batch.num_decodes == step.num_decodes
    assert batch.kv_slots_T.tolist() == [
        # What lies in shared blocks already goes to block 0, which is nobody's.
        (e.sequence.block_table[p // BLOCK] if p >= e.kv_from else 0) * BLOCK + p % BLOCK
        for e, span in zip(entries, spans, strict=True)
        for p in span
    ]
    for name in (
        "token_ids_T",
        "positions_T",
        "kv_slots_T",
        "state_slots_B",
        "context_lens_B",
        "block_tables_BM",
    ):
        part = getattr(batch, name)
        assert part.storage_offset() * part.itemsize % 16 == 0, f"{name}: kernels would be compiled anew"
    width = max((-(-end // BLOCK) for end in ends), default=0)
    assert batch.block_tables_BM.shape == (len(entries), width)
    for row, e, end in zip(batch.block_tables_BM.tolist(), entries, ends, strict=True):
        count = -(-end // BLOCK)
        assert row[:count] == e.sequence.block_table[:count]
    assert batch.state_checkpoints == tuple((i, *c) for i, e in enumerate(entries) for c in e.checkpoints)
    int64 = (batch.token_ids_T, batch.positions_T, batch.kv_slots_T, batch.state_slots_B)
    assert all(tensor.dtype == torch.int64 for tensor in int64)
    int32 = (batch.cu_seqlens, batch.context_lens_B, batch.block_tables_BM)
    assert all(tensor.dtype == torch.int32 for tensor in int32)
    assert all(tensor.is_contiguous() for tensor in (*int64, *int32))


@pytest.mark.parametrize("seed", range(6))
def test_batches_of_a_busy_rank(seed: int) -> None:
    chance = random.Random(seed)
    rank = FakeRank(blocks=22, slots=6, max_num_seqs=4, max_num_batched_tokens=20, max_model_len=60)
    builder = BatchBuilder(BLOCK, CPU)
    texts = [chance.choices(range(1, 8), k=50) for _ in range(2)]
    steps = 0
    for number in range(25):
        prompt = chance.choice(texts)[: chance.randint(1, 45)] + chance.choices(range(1, 8), k=2)
        rank.add(str(number), prompt, chance.randint(1, 12))
        while rank.scheduler.num_waiting > 1:
            step = rank.scheduler.schedule()
            batch = builder.build(step)
            check(batch, step)
            rank.scheduler.update(step, rank.run(step))
            steps += 1
    stats = rank.scheduler.stats
    assert steps > 20
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0


def test_a_step_without_entries() -> None:
    step = ScheduledStep()
    check(BatchBuilder(BLOCK, CPU).build(step), step)


def test_a_batch_stays_what_it_was_when_the_next_is_built() -> None:
    rank, builder = FakeRank(), BatchBuilder(BLOCK, CPU)
    rank.add("a", [1, 2, 3, 4, 5], 9)
    step = rank.scheduler.schedule()
    batch = builder.build(step)
    before = batch.block_tables_BM.clone()
    rank.scheduler.update(step, rank.run(step))
    for _ in range(5):
        later = rank.scheduler.schedule()
        builder.build(later)
        rank.scheduler.update(later, rank.run(later))
    assert torch.equal(batch.block_tables_BM, before)
