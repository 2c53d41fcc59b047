"""Cache allocators never hand a thing out twice; sizes stay within the budget and are refused with the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_models.interfaces import KVCache, KVCacheSpec, LayerCacheSpec, StateCache, StateCacheSpec
from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.pool import allocate
from moe_runtime.cache.sizing import (
    CachePlan,
    bytes_per_sequence,
    bytes_per_token,
    checkpoint_interval,
    plan_caches,
)
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.errors import ConfigError

ATTENTION = KVCacheSpec(num_kv_heads=2, head_size=8, dtype=torch.float32)  # 128 bytes a token
DELTA_NET = StateCacheSpec(
    conv_channels=10,
    conv_width=3,
    num_heads=2,
    key_size=4,
    value_size=5,
    conv_dtype=torch.bfloat16,  # 60 bytes
)  # and 160 bytes of float32 state


def _fields(spec: StateCacheSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__slots__}


HYBRID = (DELTA_NET, DELTA_NET, ATTENTION)


def test_blocks_are_handed_out_once_and_never_block_0() -> None:
    blocks = BlockAllocator(num_blocks=6, block_size=4)
    assert blocks.capacity == 5
    first, second = blocks.allocate(2), blocks.allocate(3)
    assert sorted(first + second) == [1, 2, 3, 4, 5]
    assert not blocks.can_allocate(1)
    blocks.free(first)
    assert blocks.num_free == 2
    assert blocks.num_used == 3
    assert sorted(blocks.allocate(2)) == sorted(first)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_tokens_round_up(tokens: int, blocks: int) -> None:
    assert BlockAllocator(2, block_size=4).blocks_for(tokens) == blocks


def test_misuse_of_blocks_fails_at_once() -> None:
    blocks = BlockAllocator(num_blocks=4, block_size=4)
    taken = blocks.allocate(2)
    with pytest.raises(AssertionError, match="2 ids wanted, 1 free"):
        blocks.allocate(2)
    blocks.free(taken)
    with pytest.raises(AssertionError, match=f"id {taken[0]} is freed twice"):
        blocks.free(taken)
    with pytest.raises(AssertionError, match="id 0 was never handed out"):
        blocks.free([0])


def test_slots_are_handed_out_once_and_never_slot_0() -> None:
    slots = SlotAllocator(num_slots=3)
    assert {slots.allocate(), slots.allocate()} == {1, 2}
    assert slots.num_free == 0
    slots.free(2)
    assert slots.num_used == 1
    assert slots.allocate() == 2
    slots.free(1)
    with pytest.raises(AssertionError, match="id 1 is freed twice"):
        slots.free(1)


def test_bytes_of_a_hybrid_model() -> None:
    assert bytes_per_token(HYBRID) == 128
    assert bytes_per_sequence(HYBRID) == 2 * (60 + 160)


def plan(specs: tuple[LayerCacheSpec, ...], budget: int, max_num_seqs: int = 4, **rest: bool) -> CachePlan:
    return plan_caches(
        specs, block_size=16, max_num_seqs=max_num_seqs, max_model_len=100, budget_bytes=budget, **rest
    )


def test_large_budget_gives_what_all_sequences_can_use_and_no_more() -> None:
    made = plan(HYBRID, 10**9, prefix_caching=False)
    assert (made.num_blocks, made.num_slots) == (1 + 4 * 7, 1 + 4)
    assert made.bytes == 29 * 16 * 128 + 5 * 440
    assert made.max_tokens == 28 * 16


@pytest.mark.parametrize(
    ("specs", "max_num_seqs", "kept"), [(HYBRID, 4, 32), (HYBRID, 50, 50), ((ATTENTION,), 50, 0)]
)
def test_large_budget_has_slots_for_states_that_are_kept(
    specs: tuple[LayerCacheSpec, ...], max_num_seqs: int, kept: int
) -> None:
    assert plan(specs, 10**9, max_num_seqs).num_slots == 1 + max_num_seqs + kept
    assert plan(specs, 10**9, max_num_seqs, prefix_caching=False).num_slots == 1 + max_num_seqs


@pytest.mark.parametrize(
    ("specs", "block_size", "wanted", "interval"),
    [
        (HYBRID, 16, None, 128),  # 440 bytes of state are 4 tokens' keys and values
        ((StateCacheSpec(**{**_fields(DELTA_NET), "num_heads": 1000}), ATTENTION), 16, None, 640),
        ((StateCacheSpec(**{**_fields(DELTA_NET), "num_heads": 50_000}), ATTENTION), 16, None, 4096),
        (HYBRID, 48, None, 144),
        ((DELTA_NET,), 16, None, 4096),
        (HYBRID, 16, 20, 32),
        (HYBRID, 16, 10_000, 10_000),
    ],
)
def test_states_are_kept_where_they_take_as_much_as_the_keys_and_values_between_them(
    specs: tuple[LayerCacheSpec, ...], block_size: int, wanted: int | None, interval: int
) -> None:
    assert checkpoint_interval(specs, block_size, wanted) == interval


def test_smallest_budget_holds_one_sequence_and_one_byte_less_is_refused() -> None:
    smallest = 8 * 16 * 128 + 2 * 440
    made = plan(HYBRID, smallest)
    assert (made.num_blocks, made.num_slots, made.bytes) == (8, 2, smallest)
    with pytest.raises(ConfigError) as caught:
        plan(HYBRID, smallest - 1)
    assert str(caught.value) == (
        "the cache budget of 17,263 bytes does not hold one sequence of max_model_len 100: 128 bytes a token and "
        "440 bytes of state a sequence make 17,264 bytes with padding; lower max_model_len to 96 or give the caches "
        "at least 17,264 bytes"
    )


def test_the_advised_length_fits() -> None:
    budget = 5 * 16 * 128 + 2 * 440 + 50
    with pytest.raises(ConfigError, match="lower max_model_len to 64 or"):
        plan(HYBRID, budget)
    plan_caches(HYBRID, block_size=16, max_num_seqs=4, max_model_len=64, budget_bytes=budget)


def test_hopeless_budget_advises_no_length() -> None:
    with pytest.raises(ConfigError, match="with padding; give the caches at least"):
        plan(HYBRID, 100)


def test_states_leave_half_of_a_tight_budget_to_blocks() -> None:
    heavy = (StateCacheSpec(**{**_fields(DELTA_NET), "num_heads": 2000}), ATTENTION)
    per_state, block = bytes_per_sequence(heavy), 16 * 128
    one = 8 * block + 2 * per_state
    made = plan(heavy, one + 4 * per_state, max_num_seqs=1000)
    assert made.num_slots == 2 + 2
    assert made.num_blocks == 8 + 2 * 7  # what the two more sequences can use
    assert made.bytes <= one + 4 * per_state


@given(
    st.sampled_from([HYBRID, (ATTENTION,), (DELTA_NET,)]),
    st.integers(1, 300_000),
    st.integers(1, 50),
    st.integers(1, 40),
    st.integers(2, 300),
)
def test_plans_stay_within_the_budget_and_serve_one_full_sequence(
    specs: tuple[LayerCacheSpec, ...], budget: int, max_num_seqs: int, block_size: int, max_model_len: int
) -> None:
    try:
        made = plan_caches(
            specs,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            budget_bytes=budget,
        )
    except ConfigError:
        blocks = -(-max_model_len // block_size) + 1
        assert blocks * block_size * bytes_per_token(specs) + 2 * bytes_per_sequence(specs) > budget
        return
    assert made.bytes <= budget
    assert made.max_tokens >= max_model_len
    assert 2 <= made.num_slots <= max_num_seqs + 1 + max(max_num_seqs, 32)
    assert made.max_tokens <= max_num_seqs * -(-max_model_len // block_size) * block_size


def test_tensors_have_the_shapes_and_bytes_of_the_plan() -> None:
    made = plan(HYBRID, 30_000)
    conv_state, _, keys_values = allocate(HYBRID, made, "cpu")
    assert isinstance(conv_state, StateCache)
    assert isinstance(keys_values, KVCache)
    assert conv_state.conv.shape == (made.num_slots, 10, 3)
    assert conv_state.conv.dtype == torch.bfloat16
    assert conv_state.state.shape == (made.num_slots, 2, 4, 5)
    assert conv_state.state.dtype == torch.float32
    assert keys_values.k.shape == keys_values.v.shape == (made.num_blocks, 16, 2, 8)
    tensors = [
        keys_values.k,
        keys_values.v,
        conv_state.conv,
        conv_state.conv,
        conv_state.state,
        conv_state.state,
    ]
    assert sum(t.nbytes for t in tensors) == made.bytes
    assert all(t.isfinite().all() for t in tensors)
