"""The scheduler of one rank: which sequences run in the next step, and how many tokens of each.

Life of a sequence: `add` puts it in the queue; `schedule` admits it, with a state slot and KV blocks, and
hands out its prompt in chunks; `update` takes the sampled tokens, one a step from then on, and ends it;
`finish` and `abort` end it from outside. Whatever ends it gives slot and blocks back. A step is scheduled,
run and updated before the next one is scheduled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.errors import ConfigError, PromptError
from moe_runtime.request import EngineRequest, FinishReason, stop_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one rank's steps."""

    max_num_seqs: int  # sequences that run at once
    max_num_batched_tokens: int  # tokens of one step
    block_size: int  # tokens a KV block
    max_model_len: int  # tokens of a sequence, prompt and output

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len must be at least 2 (a prompt and a new token), got {self.max_model_len}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence gets a token a step; raise the one "
                "or lower the other"
            )


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # holds nothing
    RUNNING = "running"  # holds a state slot and blocks
    FINISHED = "finished"  # holds nothing, never runs again


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One completion on its way. Only the scheduler writes to it; who reads it finds consistent lists."""

    request: EngineRequest  # as it came from the driver
    stop_ids: frozenset[int]  # set by `add`: tokens that end it
    max_tokens: int  # set by `add`: tokens in all, prompt and output, at which it ends
    token_ids: list[int]  # set by `add` to the prompt; `update` appends what was sampled
    output_ids: list[int] = field(default_factory=list)  # the sampled tokens alone, appended by `update`
    num_computed: int = 0  # tokens whose keys, values and states are in the caches; advanced by `update`
    block_table: list[int] = field(default_factory=list)  # KV blocks in order; set on admission
    state_slot: int = 0  # set on admission; 0 while it holds none
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None  # set when it ends
    stop_reason: int | str | None = None  # set when it ends by a stop token or, by the caller, a stop string

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to run through the model; 1 for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class ScheduledEntry:
    """What one sequence does in a step: tokens `start` to `start + num_tokens` of its `token_ids`."""

    sequence: Sequence
    start: int
    num_tokens: int
    needs_logits: bool  # the chunk reaches the last known token, so the next one is sampled


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The work of one step: decodes first, then chunks of prompts, each in order of admission."""

    entries: tuple[ScheduledEntry, ...]
    num_decodes: int  # entries at the front that run one token after others

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token, in the order in which `Scheduler.update` wants them."""
        return tuple(entry.sequence for entry in self.entries if entry.needs_logits)


class Scheduler:
    """First come, first served, with chunked prefill beside decoding.

    A sequence is admitted when a slot is free and the blocks for all that it may ever hold are, so that
    none is evicted half-way. Decodes come first in every step, prompts share what is left of its tokens.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockAllocator, slots: SlotAllocator) -> None:
        assert blocks.block_size == config.block_size, "the allocator and the scheduler differ in block_size"
        assert slots.capacity >= 1, "no sequence could ever run without a state slot"
        self.config = config
        self._blocks = blocks
        self._slots = slots
        self._waiting: OrderedDict[tuple[str, int], Sequence] = OrderedDict()
        self._running: OrderedDict[tuple[str, int], Sequence] = OrderedDict()
        self._in_flight: ScheduledStep | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    # ----------------------------------------------------------------- into the queue and out of it

    def add(self, request: EngineRequest) -> Sequence:
        """Queue a request. Raises PromptError, with the numbers, for one that could never run."""
        if request.key in self._waiting or request.key in self._running:
            raise ConfigError(
                f"request {request.request_id!r} (sample {request.sample_index}) is already in flight; give "
                "each request an id of its own"
            )
        max_tokens = self._max_tokens(request)
        needed = self._blocks.blocks_for(max_tokens)
        if needed > self._blocks.capacity:
            raise PromptError(
                f"request {request.request_id!r} may reach {max_tokens} tokens and needs {needed} KV blocks "
                f"of {self.config.block_size} tokens, but this rank has {self._blocks.capacity}; lower "
                "max_tokens, shorten the prompt or enlarge the cache"
            )
        sequence = Sequence(
            request=request,
            stop_ids=stop_ids(request.params, request.eos_token_ids),
            max_tokens=max_tokens,
            token_ids=list(request.prompt_token_ids),
        )
        self._waiting[request.key] = sequence
        return sequence

    def abort(self, request_id: str) -> list[Sequence]:
        """End all samples of a request, wherever they are; returns those that were still going on."""
        held = [*self._waiting.values(), *self._running.values()]
        aborted = [sequence for sequence in held if sequence.request.request_id == request_id]
        for sequence in aborted:
            self.finish(sequence, "abort")
        return aborted

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence from outside, for instance at a stop string.

        One that `update` has just ended keeps its place and only changes its reason: a stop string in the
        last token that max_tokens allows counts as a stop.
        """
        if sequence.status is not SequenceStatus.FINISHED:
            self._release(sequence)
            sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    # ----------------------------------------------------------------- steps

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work; it may be empty. `update` must follow before the next call."""
        assert self._in_flight is None, "the last step has not been updated"
        running = list(self._running.values())
        decoding = [s for s in running if s.num_computed and s.num_uncomputed == 1]
        entries = [_entry(sequence, 1) for sequence in decoding]
        budget = self.config.max_num_batched_tokens - len(entries)
        for sequence in running:
            if budget and not (sequence.num_computed and sequence.num_uncomputed == 1):
                entries.append(_entry(sequence, min(budget, sequence.num_uncomputed)))
                budget -= entries[-1].num_tokens
        while budget and self._waiting:
            sequence = next(iter(self._waiting.values()))
            if not self._admit(sequence):
                break  # nobody overtakes the first in the queue
            entries.append(_entry(sequence, min(budget, sequence.num_uncomputed)))
            budget -= entries[-1].num_tokens
        self._in_flight = ScheduledStep(tuple(entries), len(decoding))
        return self._in_flight

    def update(self, step: ScheduledStep, sampled: Items[int]) -> None:
        """Take the result of a step: one token for each of `step.sampled`, in that order.

        Sequences that were ended while the step ran are skipped. One that ends here has its `finish_reason`
        set and has given back slot and blocks.
        """
        assert step is self._in_flight, "only the step scheduled last can be updated"
        assert len(sampled) == len(step.sampled), f"{len(sampled)} tokens for {len(step.sampled)} sequences"
        self._in_flight = None
        tokens = iter(sampled)
        for entry in step.entries:
            token = next(tokens) if entry.needs_logits else None
            sequence = entry.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_computed += entry.num_tokens
            if token is not None:
                self._append(sequence, token)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.token_ids.append(token)
        sequence.output_ids.append(token)
        enough = len(sequence.output_ids) >= sequence.request.params.min_tokens
        if token in sequence.stop_ids and enough:
            is_eos = token in sequence.request.eos_token_ids and not sequence.request.params.ignore_eos
            self.finish(sequence, "stop", None if is_eos else token)
        elif len(sequence.token_ids) >= sequence.max_tokens:
            self.finish(sequence, "length")

    # ----------------------------------------------------------------- caches

    def _max_tokens(self, request: EngineRequest) -> int:
        """Tokens, prompt and output, at which a request ends."""
        prompt, limit = len(request.prompt_token_ids), self.config.max_model_len
        if not 0 < prompt < limit:
            raise PromptError(
                f"request {request.request_id!r} has a prompt of {prompt} tokens; it must have at least 1 "
                f"and, with max_model_len {limit}, at most {limit - 1}"
            )
        wanted = request.params.max_tokens
        return limit if wanted is None else min(limit, prompt + wanted)

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to the running ones, with slot and blocks; False if anything lacks."""
        needed = self._blocks.blocks_for(sequence.max_tokens)
        if len(self._running) >= self.config.max_num_seqs or not self._slots.num_free:
            return False
        if not self._blocks.can_allocate(needed):
            return False
        sequence.state_slot = self._slots.allocate()
        sequence.block_table = self._blocks.allocate(needed)
        sequence.status = SequenceStatus.RUNNING
        key = sequence.request.key
        self._running[key] = self._waiting.pop(key)
        return True

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue or the running ones; what it holds becomes free."""
        key = sequence.request.key
        if sequence.status is SequenceStatus.RUNNING:
            del self._running[key]
            self._slots.free(sequence.state_slot)
            self._blocks.free(sequence.block_table)
            sequence.state_slot, sequence.block_table = 0, []
        else:
            del self._waiting[key]


def _entry(sequence: Sequence, num_tokens: int) -> ScheduledEntry:
    reaches_end = num_tokens == sequence.num_uncomputed
    return ScheduledEntry(sequence, sequence.num_computed, num_tokens, reaches_end)
