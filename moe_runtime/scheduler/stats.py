"""SchedulerStats: what one rank's scheduler and caches have done, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass


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
