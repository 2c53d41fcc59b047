"""ScheduledStep: the work of one step, as the scheduler hands it to the runner."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.scheduler.sequence import Sequence

Copy = tuple[int, int]  # from, to


@dataclass(frozen=True, slots=True)
class ScheduledEntry:
    """What one sequence does in a step: tokens `start` to `start + num_tokens` of its `token_ids`."""

    sequence: Sequence
    start: int
    num_tokens: int
    needs_logits: bool  # the chunk reaches the last known token, so the next one is sampled
    kv_from: int = 0  # tokens before this position lie in shared blocks: they are read there, not written
    checkpoints: tuple[tuple[int, int], ...] = ()  # (n, slot): the state after n tokens goes to slot as well


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """The work of one step: decodes first, then chunks of prompts, each in order of urgency.

    Copies come before the forward pass; no slot or block is written twice, and sources are read as they were
    before the step.
    """

    decodes: tuple[Sequence, ...] = ()  # each runs its last token after all others and gets a new one
    chunks: tuple[ScheduledEntry, ...] = ()
    sampled: tuple[
        Sequence, ...
    ] = ()  # who gets a token, in the order in which `Scheduler.update` wants them
    state_copies: tuple[Copy, ...] = ()  # state slots: checkpoints restored into sequences' own slots
    block_copies: tuple[Copy, ...] = ()  # KV blocks: partly filled ones that a sequence goes on in

    @property
    def num_decodes(self) -> int:
        return len(self.decodes)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def entries(self) -> tuple[ScheduledEntry, ...]:
        """Decodes and chunks alike, in the order of the batch; ask before the step is updated."""
        decodes = (ScheduledEntry(s, s.num_computed, 1, True) for s in self.decodes)
        return (*decodes, *self.chunks)
