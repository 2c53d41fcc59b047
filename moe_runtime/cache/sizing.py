"""How many KV blocks and state slots fit into a budget of bytes: arithmetic only, no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:  # the interfaces import torch, which this arithmetic does not need
    from moe_models.interfaces import LayerCacheSpec


# States kept for prefixes that come back: as many as sequences run, and at least this many.
_MIN_CHECKPOINTS = 32
# Tokens between states kept in a prompt: fewer would fill the slots with one prompt, more would not be found.
_MIN_INTERVAL, _MAX_INTERVAL = 128, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Sizes of one rank's caches. Block 0 and slot 0 serve padding and are counted here."""

    block_size: int  # tokens a block
    num_blocks: int
    num_slots: int
    bytes: int  # of all layers' caches together

    @property
    def max_tokens(self) -> int:
        """Tokens that all sequences together can hold."""
        return (self.num_blocks - 1) * self.block_size


def bytes_per_token(specs: Sequence[LayerCacheSpec]) -> int:
    """KV bytes of one token over all layers."""
    return sum(getattr(spec, "bytes_per_token", 0) for spec in specs)


def bytes_per_sequence(specs: Sequence[LayerCacheSpec]) -> int:
    """DeltaNet and convolution state bytes of one sequence over all layers."""
    return sum(getattr(spec, "bytes_per_sequence", 0) for spec in specs)


def checkpoint_interval(specs: Sequence[LayerCacheSpec], block_size: int, wanted: int | None = None) -> int:
    """Tokens of a prompt between states that are kept, in whole blocks.

    Without a wish, as many tokens as have the KV bytes of one state, but from 128 to 4096: then states take
    about as much memory as the keys and values that they make usable.
    """
    if wanted is None:
        per_token = bytes_per_token(specs)
        equal = -(-bytes_per_sequence(specs) // per_token) if per_token else _MAX_INTERVAL
        wanted = min(max(equal, _MIN_INTERVAL), _MAX_INTERVAL)
    return -(-wanted // block_size) * block_size


def plan_caches(
    specs: Sequence[LayerCacheSpec],
    *,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    budget_bytes: int,
    prefix_caching: bool = True,
) -> CachePlan:
    """Divide `budget_bytes` between state slots and KV blocks.

    Never more than `max_num_seqs` sequences of `max_model_len` tokens can use, but with `prefix_caching` as
    many slots again for states that are kept (32 at least). Where that does not fit, slots beyond the first
    get at most half of what one sequence leaves, and blocks the rest: a slot without blocks serves nobody.
    Raises ConfigError, with the numbers, when not even one sequence fits.
    """
    block_bytes = bytes_per_token(specs) * block_size
    slot_bytes = bytes_per_sequence(specs)
    blocks_a_sequence = -(-max_model_len // block_size)
    one_sequence = (blocks_a_sequence + 1) * block_bytes + 2 * slot_bytes
    if one_sequence > budget_bytes:
        raise ConfigError(_too_small(specs, block_size, max_model_len, one_sequence, budget_bytes))
    left = budget_bytes - one_sequence
    more_seqs = max_num_seqs - 1
    more_slots = more_seqs
    if prefix_caching and slot_bytes:
        more_slots += max(max_num_seqs, _MIN_CHECKPOINTS)
    if slot_bytes and more_slots * slot_bytes + more_seqs * blocks_a_sequence * block_bytes > left:
        more_slots = min(more_slots, (left // 2 if block_bytes else left) // slot_bytes)
    more_blocks = min(more_seqs, more_slots) * blocks_a_sequence
    if block_bytes:
        more_blocks = min(more_blocks, (left - more_slots * slot_bytes) // block_bytes)
    num_blocks, num_slots = 1 + blocks_a_sequence + more_blocks, 2 + more_slots
    return CachePlan(
        block_size=block_size,
        num_blocks=num_blocks,
        num_slots=num_slots,
        bytes=num_blocks * block_bytes + num_slots * slot_bytes,
    )


def _too_small(
    specs: Sequence[LayerCacheSpec], block_size: int, max_model_len: int, needed: int, budget: int
) -> str:
    per_token, per_sequence = bytes_per_token(specs), bytes_per_sequence(specs)
    # One block and one slot serve padding, and each sequence has one slot.
    room = (
        (budget - 2 * per_sequence - block_size * per_token) // (block_size * per_token) if per_token else 0
    )
    way_out = f"lower max_model_len to {room * block_size} or give" if room > 0 else "give"
    return (
        f"the cache budget of {budget:,} bytes does not hold one sequence of max_model_len {max_model_len}: "
        f"{per_token:,} bytes a token and {per_sequence:,} bytes of state a sequence make {needed:,} bytes "
        f"with padding; {way_out} the caches at least {needed:,} bytes"
    )
