"""SchedulerStats: what one rank's scheduler and caches have done, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.scheduler.memory import SequenceMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """A snapshot. Counters run since the scheduler was made."""

    num_running: int
    num_waiting: int
    preemptions: int
    block_evictions: int  # cached KV blocks given up for new ones
    checkpoint_evictions: int  # kept states given up for running sequences or newer states
    prefix_query_tokens: int  # tokens of prompts that were looked up
    prefix_hit_tokens: int  # of these, tokens that need not be computed
    blocks_used: int  # KV blocks that running sequences hold
    blocks_cached: int  # KV blocks that only the prefix tree holds
    blocks_total: int
    slots_used: int  # state slots of running sequences
    slots_cached: int  # state slots that hold checkpoints
    slots_total: int

    @classmethod
    def of(
        cls, memory: SequenceMemory, num_running: int, num_waiting: int, preemptions: int
    ) -> SchedulerStats:
        """The counters of a scheduler and of what its sequences hold."""
        tree = memory.tree
        return cls(
            num_running=num_running,
            num_waiting=num_waiting,
            preemptions=preemptions,
            block_evictions=tree.num_block_evictions,
            checkpoint_evictions=tree.num_checkpoint_evictions,
            prefix_query_tokens=memory.prefix_query_tokens,
            prefix_hit_tokens=memory.prefix_hit_tokens,
            blocks_used=memory.blocks.num_used - tree.num_unused_blocks,
            blocks_cached=tree.num_unused_blocks,
            blocks_total=memory.blocks.capacity,
            slots_used=memory.slots.num_used - tree.num_checkpoints,
            slots_cached=tree.num_checkpoints,
            slots_total=memory.slots.capacity,
        )
