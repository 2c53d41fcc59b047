"""SequenceMemory: what sequences hold of the caches, from admission to the end, and what stays cached after."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.prefix import Match, PrefixTree
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.scheduler.config import SchedulerConfig
from moe_runtime.scheduler.sequence import Sequence
from moe_runtime.scheduler.step import Copy, ScheduledEntry

# Of the blocks, this share stays free when a sequence is admitted beside others, for those to grow into.
_SPARE_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class _Refused:
    """The last admission for which something lacked, and what would have to be otherwise."""

    sequence: Sequence
    num_tokens: int  # for which it was to have blocks
    num_released: int  # sequences that had given back what they held
    num_free: int  # blocks


class SequenceMemory:
    """Gives sequences slots and blocks, shares what they compute, and takes it all back."""

    def __init__(self, config: SchedulerConfig, blocks: BlockAllocator, slots: SlotAllocator) -> None:
        self.blocks = blocks
        self.slots = slots
        self.prefix_query_tokens = 0  # of sequences that were admitted for the first time
        self.prefix_hit_tokens = 0
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._keeps_states = config.enable_prefix_caching and config.has_state
        self._interval = self.blocks_for(config.state_checkpoint_interval) * config.block_size
        self._spare = int(blocks.capacity * _SPARE_SHARE)
        max_checkpoints = int(slots.capacity * config.state_checkpoint_share)
        self.tree = PrefixTree(blocks, slots, has_state=config.has_state, max_checkpoints=max_checkpoints)
        self._stamps = count(1)
        self._num_released = 0
        self._refused: _Refused | None = None

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self._block_size)

    # ----------------------------------------------------------------- admission

    def can_share(self, sequence: Sequence) -> bool:
        """Whether another sequence with the same prompt would find the better part of it once it is computed."""
        wanted = sequence.request.params.prompt_logprobs
        last_boundary = self._last_boundary(len(sequence.request.prompt_token_ids))
        return self._caching and wanted is None and sequence.num_computed < last_boundary

    def fits(self, sequence: Sequence, num_tokens: int, beside_others: bool) -> bool:
        """Whether `admit` would succeed now, with as many tokens or fewer."""
        self._refused = None
        return self._lookup(sequence, num_tokens, beside_others) is not None

    def _lookup(self, sequence: Sequence, num_tokens: int, beside_others: bool) -> tuple[Match, int] | None:
        """What is cached of a sequence, and how many blocks its next tokens need besides; None where they lack."""
        match = self._match(sequence)
        until = match.num_tokens + min(num_tokens, len(sequence.token_ids) - match.num_tokens)
        needed = max(0, self.blocks_for(until) - len(match.path))
        used_by_nobody_else = sum(not node.num_users for node in match.path)
        available = self.tree.num_available_blocks - used_by_nobody_else
        if not self.tree.has_available_slot or available < needed + (self._spare if beside_others else 0):
            return None
        return match, needed

    def _match(self, sequence: Sequence) -> Match:
        """At least one token is left to compute, and none whose logprobs are still to be reported is skipped."""
        if not self._caching:
            return Match([])
        limit = len(sequence.token_ids) - 1
        if sequence.request.params.prompt_logprobs is not None:
            limit = min(limit, sequence.num_reported)
        return self.tree.match(sequence.token_ids, limit)

    def admit(
        self, sequence: Sequence, num_tokens: int, beside_others: bool
    ) -> tuple[list[Copy], list[Copy]] | None:
        """Give a sequence a slot, its cached beginning, and blocks for its next `num_tokens` tokens.

        Returns the copies of states and of blocks that must precede its next forward pass, or None, with
        nothing changed, where blocks or a slot lack.
        """
        if self._is_still_refused(sequence, num_tokens):
            return None
        found = self._lookup(sequence, num_tokens, beside_others)
        if found is None:
            free = self.tree.num_available_blocks
            self._refused = _Refused(sequence, num_tokens, self._num_released, free)
            return None
        match, needed = found
        self.tree.pin(match.path)
        source_slot = source_block = 0
        if match.source is not None:
            self.tree.touch(match.source)
            source_slot = match.source.slot
            if match.num_tokens > len(match.path) * self._block_size:
                source_block = match.source.block
        # From here on the source may be evicted, even by this sequence: the copies come first in the step.
        sequence.state_slot = self.tree.take_slot()
        sequence.path = match.path
        sequence.block_table = [node.block for node in match.path]
        self._append_blocks(sequence, needed)
        sequence.rewrite_stamp = sequence.table_stamp
        sequence.num_computed = match.num_tokens
        sequence.num_shared = len(match.path) * self._block_size
        sequence.branch_at = sequence.num_shared if sequence.num_shared > match.num_tokens else 0
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = match.num_tokens
            self.prefix_query_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += match.num_tokens
        states = [(source_slot, sequence.state_slot)]
        blocks = [(source_block, sequence.block_table[len(match.path)])] if source_block else []
        return [c for c in states if c[0] and c[0] != c[1]], [c for c in blocks if c[0] != c[1]]

    def _is_still_refused(self, sequence: Sequence, num_tokens: int) -> bool:
        """Looking a long prompt up costs time: not again before something has changed for the better."""
        refused = self._refused
        return (
            refused is not None
            and refused.sequence is sequence
            and refused.num_tokens <= num_tokens
            and refused.num_released == self._num_released
            and refused.num_free >= self.tree.num_available_blocks
        )

    # ----------------------------------------------------------------- while it runs

    def room(self, sequence: Sequence) -> int:
        """Tokens after the computed ones for which it has blocks or can get them."""
        available = self.tree.num_available_blocks * self._block_size
        return sequence.capacity + available - sequence.num_computed

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give it blocks for its next `num_tokens` tokens; the caller has asked `room`."""
        needed = self.blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_table)
        if needed > 0:
            self._append_blocks(sequence, needed)

    def _append_blocks(self, sequence: Sequence, needed: int) -> None:
        sequence.block_table += self.tree.take_blocks(needed)
        sequence.capacity = len(sequence.block_table) * self._block_size
        sequence.table_stamp = next(self._stamps)

    def entry(self, sequence: Sequence, num_tokens: int) -> ScheduledEntry:
        """The entry of a chunk, with slots for the states that the chunk is worth keeping."""
        start = sequence.num_computed
        wanted = self._checkpoints_within(sequence, start, start + num_tokens)
        slots = (self.tree.reserve_checkpoint() for _ in wanted)
        return ScheduledEntry(
            sequence,
            start,
            num_tokens,
            needs_logits=num_tokens == sequence.num_uncomputed,
            kv_from=sequence.num_shared,
            checkpoints=tuple([(at - start, slot) for at, slot in zip(wanted, slots, strict=True) if slot]),
        )

    def _checkpoints_within(self, sequence: Sequence, start: int, end: int) -> list[int]:
        """Positions after `start`, up to `end`, in order: the interval's, the branch, the last boundary."""
        if not self._keeps_states:
            return []
        interval = self._interval
        wanted = set(range((start // interval + 1) * interval, end + 1, interval))
        wanted.update((sequence.branch_at, self._last_boundary(len(sequence.token_ids))))
        path, size = sequence.path, self._block_size
        kept = {at for at in wanted if 0 < at <= len(path) * size and path[at // size - 1].slot}
        return sorted(at for at in wanted - kept if start < at <= end)

    def _last_boundary(self, num_tokens: int) -> int:
        """Where a sequence of the same tokens would go on: one token must be left for it to compute."""
        return (num_tokens - 1) // self._block_size * self._block_size

    def commit(self, sequence: Sequence) -> None:
        """Share the full blocks that it has computed; one that is there already replaces its own."""
        if not self._caching:
            return
        size, path, table = self._block_size, sequence.path, sequence.block_table
        for index in range(len(path), sequence.num_computed // size):
            tokens = tuple(sequence.token_ids[index * size : (index + 1) * size])
            node = self.tree.insert(path[-1] if path else self.tree.root, tokens, table[index])
            path.append(node)
            if node.block != table[index]:
                table[index] = node.block
                sequence.table_stamp = sequence.rewrite_stamp = next(self._stamps)

    def keep_checkpoints(self, entry: ScheduledEntry) -> None:
        """The entry has run and is committed: its states belong to the nodes where they were made."""
        for num_tokens, slot in entry.checkpoints:
            self.tree.attach(entry.sequence.path[(entry.start + num_tokens) // self._block_size - 1], slot)

    def drop_checkpoints(self, entry: ScheduledEntry) -> None:
        """The entry's sequence ended while it ran."""
        for _, slot in entry.checkpoints:
            self.tree.give_up(slot)

    # ----------------------------------------------------------------- the end

    def release(self, sequence: Sequence, *, in_flight: bool) -> None:
        """Take everything back. Full blocks stay cached, and so do the last block and the state.

        `in_flight`: a step that is not updated yet moves the state on, so that it is of no use.
        """
        self._num_released += 1
        private = len(sequence.path)
        slot_is_kept = False
        if self._keeps_states and not in_flight and sequence.num_computed >= self._block_size:
            private, slot_is_kept = self._donate_state(sequence)
        if not slot_is_kept:
            self.tree.free_slot(sequence.state_slot)
        self.tree.free_blocks(sequence.block_table[private:])
        self.tree.unpin(sequence.path)
        sequence.state_slot, sequence.block_table, sequence.path, sequence.capacity = 0, [], [], 0

    def _donate_state(self, sequence: Sequence) -> tuple[int, bool]:
        """Leave the state in the tree; returns how many blocks are the tree's, and whether the slot is."""
        size, path = self._block_size, sequence.path
        depth, rest = divmod(sequence.num_computed, size)
        if rest == 0:
            self.tree.attach(path[depth - 1], sequence.state_slot)
            return len(path), True
        if depth < len(path):
            return len(path), False  # it was recomputing what the tree has, and has no block of its own here
        tokens = tuple(sequence.token_ids[depth * size : sequence.num_computed])
        self.tree.add_tail(path[-1], tokens, sequence.block_table[depth], sequence.state_slot)
        return depth + 1, True
