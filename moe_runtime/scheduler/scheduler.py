"""The scheduler of one rank: which sequences run in the next step, and how many tokens of each.

Life of a sequence: `add` puts it in the queue; `schedule` admits it, with a state slot and KV blocks, and
hands out its prompt in chunks; `update` takes the sampled tokens, one a step from then on, and ends it;
`finish` and `abort` end it from outside. Where blocks run out, the least urgent sequence is preempted: it goes
back to the queue and computes its tokens again, except those that the caches still hold. A step is scheduled,
run and updated before the next one is scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.errors import ConfigError, QueueFullError
from moe_runtime.request import EngineRequest, FinishReason, stop_ids
from moe_runtime.scheduler.config import SchedulerConfig
from moe_runtime.scheduler.limits import max_tokens_of
from moe_runtime.scheduler.memory import SequenceMemory
from moe_runtime.scheduler.queues import SequenceQueues
from moe_runtime.scheduler.sequence import Sequence, SequenceStatus
from moe_runtime.scheduler.stats import SchedulerStats
from moe_runtime.scheduler.step import Copy, ScheduledStep


class Scheduler:
    """Most urgent first, with chunked prefill beside decoding.

    Urgency is the order of arrival, or priority and then arrival. Every sequence that decodes gets a token in
    every step, prompts share what is left. The most urgent sequence takes blocks from all others, so it always
    goes on.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockAllocator, slots: SlotAllocator) -> None:
        assert blocks.block_size == config.block_size, "the allocator and the scheduler differ in block_size"
        assert slots.capacity >= 1, "no sequence could ever run without a state slot"
        self.config = config
        self._blocks = blocks
        self._slots = slots
        self._memory = SequenceMemory(config, blocks, slots)
        self._queues = SequenceQueues()
        self._in_flight: ScheduledStep | None = None
        self._num_arrived = 0
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._queues.waiting or self._queues.running)

    @property
    def stats(self) -> SchedulerStats:
        """What happened so far, and what the caches hold now."""
        return SchedulerStats.of(self._memory, self.num_running, self.num_waiting, self._num_preemptions)

    # ----------------------------------------------------------------- into the queue and out of it

    def add(self, request: EngineRequest) -> Sequence:
        """Queue a request; PromptError for one that could never run, QueueFullError where too many wait."""
        samples = self._queues.samples(request.request_id)
        if any(sample.request.sample_index == request.sample_index for sample in samples):
            raise ConfigError(
                f"request {request.request_id!r} (sample {request.sample_index}) is already in flight; give "
                "each request an id of its own"
            )
        max_tokens = max_tokens_of(request, self.config.max_model_len, self._blocks)
        self.check_queue(request)
        self._num_arrived += 1
        sequence = Sequence(
            request=request,
            order=(request.priority if self.config.policy == "priority" else 0, self._num_arrived),
            stop_ids=stop_ids(request.params, request.eos_token_ids),
            max_tokens=max_tokens,
            token_ids=list(request.prompt_token_ids),
        )
        self._queues.add(sequence)
        return sequence

    def check_queue(self, request: EngineRequest, num_elsewhere: int = 0) -> None:
        """Raise QueueFullError where too many wait, here and `num_elsewhere`."""
        limit, num_waiting = self.config.max_waiting, self.num_waiting + num_elsewhere
        if limit is not None and num_waiting >= limit:
            raise QueueFullError(
                f"request {request.request_id!r} is refused: {num_waiting} sequences wait and the limit "
                f"is {limit}; try again later, or raise max_waiting"
            )

    def abort(self, request_id: str) -> list[Sequence]:
        """End all samples of a request, wherever they are; returns those that were still going on."""
        aborted = list(self._queues.samples(request_id))
        for sequence in aborted:
            self.finish(sequence, "abort")
        return aborted

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence from outside, for instance at a stop string.

        One that `update` has just ended keeps its place and only changes its reason: a stop string in the
        last token that max_tokens allows counts as a stop.
        """
        if sequence.status is not SequenceStatus.FINISHED:
            self._give_back(sequence)
            self._queues.remove(sequence)
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def _give_back(self, sequence: Sequence) -> None:
        """Take all that a sequence holds, if it runs."""
        if sequence.status is not SequenceStatus.RUNNING:
            return
        step = self._in_flight
        in_flight = step is not None and (
            sequence in step.decodes or any(chunk.sequence is sequence for chunk in step.chunks)
        )
        self._memory.release(sequence, in_flight=in_flight)
        sequence.is_decoding = False

    # ----------------------------------------------------------------- the next step

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work; it is empty only where nothing waits or runs.

        `update` must follow before the next call. A sequence may be ended before that, but not before the step
        has run: the runner reads what the sequence holds.
        """
        assert self._in_flight is None, "the last step has not been updated"
        waiting, running = self._queues.waiting, self._queues.running
        urgent = self._make_room_for_urgent() if waiting and self.config.policy == "priority" else None
        preempted_before = self._num_preemptions
        work = self._find_blocks(urgent)
        decodes = tuple([s for s in running if s.is_decoding])
        states: list[Copy] = []
        blocks: list[Copy] = []
        if waiting and self._num_preemptions == preempted_before:
            budget = self.config.max_num_batched_tokens - len(decodes) - sum(n for _, n in work)
            work += self._admit_waiting(budget, states, blocks)
        # Last, so that states are kept only in slots that no sequence wanted.
        entries = tuple([self._memory.entry(s, n) for s, n in work])
        sampled = (*decodes, *(e.sequence for e in entries if e.needs_logits)) if entries else decodes
        self._in_flight = ScheduledStep(
            decodes=decodes,
            chunks=entries,
            sampled=sampled,
            state_copies=tuple(states),
            block_copies=tuple(blocks),
        )
        return self._in_flight

    def _find_blocks(self, urgent: Sequence | None) -> list[tuple[Sequence, int]]:
        """Give running sequences blocks for this step, the most urgent first; preempts where none is left.

        Returns the prompts' chunks. Prompts of lower priority than `urgent`, which waits, let it go first.
        """
        memory, running = self._memory, self._queues.running
        for sequence in [s for s in running if s.is_decoding and s.num_computed >= s.capacity]:
            while sequence.is_decoding and memory.room(sequence) < 1:
                self._preempt(running[-1])
            if sequence.is_decoding:
                memory.grow(sequence, 1)
        prefilling = [s for s in running if not s.is_decoding]
        if not prefilling:
            return []
        chunks: list[tuple[Sequence, int]] = []
        budget = self.config.max_num_batched_tokens - (len(running) - len(prefilling))
        for sequence in prefilling:
            if budget < 1 or sequence.status is not SequenceStatus.RUNNING:
                break
            if urgent is not None and urgent.order[0] < sequence.order[0]:
                break
            # The least urgent one waits for blocks with what it has, any other takes them.
            while (room := memory.room(sequence)) < 1 and running[-1] is not sequence:
                self._preempt(running[-1])
            num_tokens = min(budget, sequence.num_uncomputed, room)
            if num_tokens > 0:
                memory.grow(sequence, num_tokens)
                chunks.append((sequence, num_tokens))
                budget -= num_tokens
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, where it stands before all that are less urgent."""
        self._give_back(sequence)
        self._queues.send_back(sequence)
        sequence.num_reported = max(sequence.num_reported, sequence.num_computed)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1

    def _make_room_for_urgent(self) -> Sequence | None:
        """Preempt running sequences of lower priority for the first in the queue, until it fits.

        Returns it, if any running sequence has a lower priority.
        """
        queues, running = self._queues, self._queues.running
        urgent = next((s for s in queues.waiting if not queues.is_held(s)), None)
        if urgent is None or not running or running[-1].order[0] <= urgent.order[0]:
            return None
        while running and running[-1].order[0] > urgent.order[0]:
            has_place = len(running) < self.config.max_num_seqs
            # It gets no more tokens than this, so what fits here fits when it is admitted.
            budget = self.config.max_num_batched_tokens - sum(s.is_decoding for s in running)
            if has_place and self._memory.fits(urgent, budget, beside_others=True):
                break
            self._preempt(running[-1])
        return urgent

    # ----------------------------------------------------------------- admission

    def _admit_waiting(
        self, budget: int, states: list[Copy], blocks: list[Copy]
    ) -> list[tuple[Sequence, int]]:
        """Admit from the queue while tokens are left; the copies that this asks for are appended."""
        admitted = []
        index = 0
        queues = self._queues
        while budget > 0 and index < len(queues.waiting):
            sequence = queues.waiting[index]
            if queues.is_held(sequence):
                index += 1
                continue
            has_place = self.num_running < self.config.max_num_seqs
            copies = self._memory.admit(sequence, budget, self.num_running > 0) if has_place else None
            if copies is None:
                break  # nobody overtakes the first in the queue
            queues.start(index)
            if self._memory.can_share(sequence):
                queues.hold_others(sequence)
            states += copies[0]
            blocks += copies[1]
            num_tokens = min(budget, sequence.num_uncomputed)
            admitted.append((sequence, num_tokens))
            budget -= num_tokens
        return admitted

    # ----------------------------------------------------------------- results

    def update(self, step: ScheduledStep, sampled: Items[int]) -> None:
        """Take the result of a step: one token for each of `step.sampled`, in that order.

        Sequences that were ended while the step ran are skipped. One that ends here has its `finish_reason`
        set and has given back slot and blocks.
        """
        assert step is self._in_flight, "only the step scheduled last can be updated"
        assert len(sampled) == len(step.sampled), f"{len(sampled)} tokens for {len(step.sampled)} sequences"
        self._in_flight = None
        block_size, commit, finished = self.config.block_size, self._memory.commit, SequenceStatus.FINISHED
        # Written out for speed: at most steps all sequences are here.
        for sequence, token in zip(step.decodes, sampled, strict=False):
            if sequence.status is finished:
                continue
            sequence.num_computed = computed = sequence.num_computed + 1
            sequence.token_ids.append(token)
            sequence.output_ids.append(token)
            if not computed % block_size:
                commit(sequence)
            if token in sequence.stop_ids or computed + 1 >= sequence.max_tokens:
                self._end_if_due(sequence, token)
        if step.chunks:
            self._update_chunks(step, sampled[len(step.decodes) :])

    def _update_chunks(self, step: ScheduledStep, sampled: Items[int]) -> None:
        tokens = iter(sampled)
        for entry in step.chunks:
            token = next(tokens) if entry.needs_logits else None
            sequence = entry.sequence
            if sequence.status is SequenceStatus.FINISHED:
                self._memory.drop_checkpoints(entry)
                continue
            sequence.num_computed += entry.num_tokens
            self._memory.commit(sequence)
            self._memory.keep_checkpoints(entry)
            if token is not None:
                sequence.token_ids.append(token)
                sequence.output_ids.append(token)
            if sequence.num_uncomputed == 1:
                sequence.is_decoding = True
                self._queues.end_hold(sequence)
            if token is not None:
                self._end_if_due(sequence, token)

    def _end_if_due(self, sequence: Sequence, token: int) -> None:
        """End a sequence whose newest token ends it."""
        params = sequence.request.params
        # The mask of a structured text lets an early end through only where it can have no other.
        structured = params.structured_outputs is not None
        if token in sequence.stop_ids and (structured or len(sequence.output_ids) >= params.min_tokens):
            is_eos = token in sequence.request.eos_token_ids and (structured or not params.ignore_eos)
            self.finish(sequence, "stop", None if is_eos else token)
        elif len(sequence.token_ids) >= sequence.max_tokens:
            self.finish(sequence, "length")
