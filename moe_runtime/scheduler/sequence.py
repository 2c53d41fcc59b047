"""Sequence: one completion on its way, from the queue to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from moe_runtime.cache.prefix import Node
from moe_runtime.request import EngineRequest, FinishReason


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # holds nothing: new, or preempted
    RUNNING = "running"  # holds a state slot and blocks
    FINISHED = "finished"  # holds nothing, never runs again


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One completion on its way. Only the scheduler writes to it; who reads it finds consistent lists."""

    request: EngineRequest  # as it came from the driver
    order: tuple[int, int]  # set by `add`: (priority, arrival); the smaller goes first
    stop_ids: frozenset[int]  # set by `add`: tokens that end it
    max_tokens: int  # set by `add`: tokens in all, prompt and output, at which it ends
    token_ids: list[int]  # set by `add` to the prompt; `update` appends what was sampled
    output_ids: list[int] = field(default_factory=list)  # the sampled tokens alone, appended by `update`
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None  # set when it ends
    stop_reason: int | str | None = None  # set when it ends by a stop token or, by the caller, a stop string

    num_computed: int = 0  # tokens whose keys, values and states are in the caches; advanced by `update`
    is_decoding: bool = False  # runs, and all but the last of its tokens are computed; kept by the scheduler
    num_cached_tokens: int = 0  # prompt tokens that were found in the caches when it first ran
    num_reported: int = 0  # tokens computed before it was last preempted: their logprobs have been reported
    num_preemptions: int = 0

    # What it holds while it runs; written by SequenceMemory.
    state_slot: int = 0
    block_table: list[int] = field(default_factory=list)  # KV blocks in order
    path: list[Node] = field(default_factory=list)  # prefix nodes of the first blocks of `block_table`
    capacity: int = 0  # tokens that its blocks hold
    num_shared: int = 0  # tokens at the front whose keys and values others had computed when it was admitted
    branch_at: int = 0  # where its tokens left a cached path that had no state; 0: nowhere
    table_stamp: int = 0  # another number after every change of `block_table`
    rewrite_stamp: int = 0  # another number after every change that was more than an appended block

    sampling_row: object | None = None  # the runner's own, made when it first samples
    matcher: object | None = (
        None  # set by the step loop after `add`, for the runner: where a structured text is
    )

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to run through the model; 1 for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed
