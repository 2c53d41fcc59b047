"""StepLoop: what a rank does over and over: take mail, schedule, agree with the other ranks, run, deliver."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from moe_models.interfaces import TokenDispatcher
from moe_runtime.delivery import Delivery
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.cache import GrammarCache
from moe_runtime.grammar.gate import GrammarGate, Outcome
from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.request import EngineRequest, OutputDelta
from moe_runtime.runner import StepResult
from moe_runtime.scheduler import ScheduledStep, Scheduler, Sequence
from moe_runtime.timing.dispatch import TimedDispatcher
from moe_runtime.timing.parts import Part
from moe_runtime.timing.timer import PartTimer
from moe_runtime.transport.mailbox import Mailbox, Submitted
from moe_runtime.transport.rank_server import RankServer
from moe_runtime.transport.wire import Deltas, Refused

_NO_WORK = ScheduledStep()

# Steps are counted by their tokens: the i-th count is of those with at most 2 ** i, and more than half of that.
_NUM_STEP_SIZES = 24


class StepRunner(Protocol):
    """Runs one step through the model (or through none, to measure everything else)."""

    def run(self, step: ScheduledStep, dispatcher: TokenDispatcher) -> StepResult: ...


@dataclass(slots=True)
class LoopStats:
    """Counted by the loop since it started; read by other threads."""

    steps: int = 0
    step_tokens: int = 0  # that this rank had in them
    decode_steps: int = 0  # those of `steps` in which no rank computed prompts
    decode_tokens: int = 0  # that this rank had in those
    parkings: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    requests_finished: int = 0
    # Seconds of the loop's own parts, as they add up.
    schedule_s: float = 0.0
    agree_s: float = 0.0
    run_s: float = 0.0
    deliver_s: float = 0.0


class StepLoop:
    """Runs until some rank is told to stop. All ranks of a deployment run one, in lockstep."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: StepRunner,
        delivery: Delivery,
        mailbox: Mailbox,
        server: RankServer,
        agree: Callable[[list[int]], list[list[int]]],
        dispatcher_for_step: Callable[[tuple[int, ...]], TokenDispatcher],
        timer: PartTimer[Any],
        generation: int,
        grammars: GrammarCache | None = None,
    ) -> None:
        """
        Args:
            agree: exchanges a few whole numbers with all ranks; every rank calls it once a step.
            dispatcher_for_step: given the tokens of every rank in the step.
            timer: is told of every step and of its parts.
            generation: of the deployment; wake-ups of an earlier one are ignored.
            grammars: of structured requests; None where the model has no tokenizer, so that there are none.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._delivery = delivery
        self._mailbox = mailbox
        self._server = server
        self._agree = agree
        self._dispatcher_for_step = dispatcher_for_step
        self._timer = timer
        self._generation = generation
        self._gate = None if grammars is None else GrammarGate(grammars, mailbox.call, self._add_structured)
        self._open_samples: Counter[str] = Counter()  # samples of each request that have not ended
        self.stats = LoopStats()
        self.step_sizes = [0] * _NUM_STEP_SIZES  # see _NUM_STEP_SIZES; of steps in which this rank had tokens

    def run(self) -> None:
        """Take part in steps until all ranks agree to stop."""
        agreement = 0
        while True:
            began = time.perf_counter()
            self._timer.start()
            self._take_mail()
            # A paused rank keeps its work to itself; once all are paused, nobody has any and all park.
            has_work = self._scheduler.has_work and not self._mailbox.paused
            step = self._scheduler.schedule() if has_work else _NO_WORK
            scheduled = time.perf_counter()
            if step.chunks:
                self._delivery.begin(step.chunks, scheduled)
            self._timer.switch(Part.WAITING)
            agreed = self._agree([step.num_tokens, len(step.chunks), has_work, self._mailbox.stopping])
            self._timer.switch(Part.OTHER)
            agreement += 1
            self.stats.schedule_s += scheduled - began
            self.stats.agree_s += time.perf_counter() - scheduled
            if any(stopping for *_, stopping in agreed):
                return
            if any(work for _, _, work, _ in agreed):
                has_prompts = any(chunks for _, chunks, _, _ in agreed)
                self._run_step(step, tuple([tokens for tokens, *_ in agreed]), has_prompts)
            else:
                self.stats.parkings += 1
                self._mailbox.park(agreement, self._scheduler.has_work, self._wake_peers)
                # What is not there when a step begins waits for its end, on its rank alone.
                if len(agreed) > 1:
                    self._mailbox.settle()

    def _run_step(self, step: ScheduledStep, token_counts: tuple[int, ...], has_prompts: bool) -> None:
        began = time.perf_counter()
        dispatcher = self._dispatcher_for_step(token_counts)
        if self._timer.measures:
            dispatcher = TimedDispatcher(dispatcher, self._timer)
        result = self._runner.run(step, dispatcher)
        ran = time.perf_counter()
        if result.failed:
            self._end_failed(result)
        if step is not _NO_WORK:
            self._scheduler.update(step, result.token_ids)
        self._delivery.take(self._scheduler, step, result)
        self._deliver()
        self._timer.stop(has_prompts)
        if step.num_tokens:
            self.step_sizes[min((step.num_tokens - 1).bit_length(), _NUM_STEP_SIZES - 1)] += 1
        stats = self.stats
        stats.steps += 1
        stats.step_tokens += step.num_tokens
        if not has_prompts:
            stats.decode_steps += 1
            stats.decode_tokens += step.num_tokens
        stats.generation_tokens += len(result.token_ids)
        stats.prompt_tokens += step.num_tokens - step.num_decodes
        stats.run_s += ran - began
        stats.deliver_s += time.perf_counter() - ran

    def _take_mail(self) -> None:
        mail = self._mailbox.take()
        for submitted in mail.submitted:
            try:
                self._submit(submitted)
            except MoeRuntimeError as error:
                # Only this request is at fault; the driver checks what it can before it sends one.
                self._refuse(submitted.driver, submitted.request, error)
        for call in mail.calls:
            call()
        for request_id in mail.aborted:
            for sequence in self._scheduler.abort(request_id):
                self._delivery.end(sequence)
            if self._gate is not None:
                self._abort_at_gate(self._gate, request_id)
        if mail.aborted:
            self._deliver()

    def _submit(self, submitted: Submitted) -> None:
        request = submitted.request
        if request.params.structured_outputs is None:
            self._add(submitted)
        elif self._gate is None:
            raise ConfigError("structured_outputs needs a tokenizer, and the checkpoint has none")
        else:
            self._scheduler.check_queue(request, self._gate.num_waiting)
            self._gate.enter(submitted)

    def _add(self, submitted: Submitted) -> Sequence:
        sequence = self._scheduler.add(submitted.request)
        self._delivery.open(sequence, submitted.driver, submitted.at)
        self._open_samples[submitted.request.request_id] += 1
        return sequence

    # ----------------------------------------------------------------- structured requests

    def _add_structured(self, submitted: Submitted, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, MoeRuntimeError):
                raise outcome
            sequence = self._add(submitted)
        except MoeRuntimeError as error:
            self._refuse(submitted.driver, submitted.request, error)
        else:
            sequence.matcher = TokenMatcher(outcome, submitted.request, sequence.output_ids)

    def _abort_at_gate(self, gate: GrammarGate, request_id: str) -> None:
        for driver, request, _ in gate.abort(request_id):
            delta = OutputDelta(
                request_id=request_id, sample_index=request.sample_index, finish_reason="abort"
            )
            self._server.deliver(driver, Deltas([delta]))
            self.stats.requests_finished += 1
            if request_id not in self._open_samples:
                self._server.forget([request_id])

    def _end_failed(self, result: StepResult) -> None:
        """End the sequences that cannot go on, before the scheduler takes the step's result."""
        for sequence, error in result.failed.items():
            self._scheduler.finish(sequence, "abort")
            self._refuse(self._delivery.drop(sequence), sequence.request, error)
            request_id = sequence.request.request_id
            self._open_samples -= Counter([request_id])
            self.stats.requests_finished += 1
            if request_id not in self._open_samples:
                self._server.forget([request_id])

    # ----------------------------------------------------------------- to the outside

    def _refuse(self, driver: str, request: EngineRequest, error: MoeRuntimeError) -> None:
        self._server.refuse(driver, Refused(request.request_id, type(error).__name__, str(error)))

    def _wake_peers(self, agreement: int) -> None:
        self._server.wake_peers(self._generation, agreement)

    def _deliver(self) -> None:
        ended: Counter[str] = Counter()
        for driver, message in self._delivery.drain().items():
            self._server.deliver(driver, message)
            ended.update(delta.request_id for delta in message.deltas if delta.finish_reason is not None)
        if ended:
            self.stats.requests_finished += ended.total()
            self._open_samples -= ended  # drops the requests whose count reaches zero
            self._server.forget(request_id for request_id in ended if request_id not in self._open_samples)
