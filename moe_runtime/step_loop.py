"""StepLoop: what a rank does over and over: take mail, schedule, agree with the other ranks, run, deliver."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moe_models.interfaces import TokenDispatcher
from moe_runtime.delivery import Delivery
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.runner import StepResult
from moe_runtime.scheduler import ScheduledStep, Scheduler
from moe_runtime.transport.mailbox import Mailbox
from moe_runtime.transport.rank_server import RankServer
from moe_runtime.transport.wire import Refused

_NO_WORK = ScheduledStep()


class StepRunner(Protocol):
    """Runs one step through the model (or through none, to measure everything else)."""

    def run(self, step: ScheduledStep, dispatcher: TokenDispatcher) -> StepResult: ...


@dataclass(slots=True)
class LoopStats:
    """Counted by the loop since it started; read by other threads."""

    steps: int = 0
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
        generation: int,
    ) -> None:
        """
        Args:
            agree: exchanges a few whole numbers with all ranks; every rank calls it once a step.
            dispatcher_for_step: given the tokens of every rank in the step.
            generation: of the deployment; wake-ups of an earlier one are ignored.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._delivery = delivery
        self._mailbox = mailbox
        self._server = server
        self._agree = agree
        self._dispatcher_for_step = dispatcher_for_step
        self._generation = generation
        self._open_samples: Counter[str] = Counter()  # samples of each request that have not ended
        self.stats = LoopStats()

    def run(self) -> None:
        """Take part in steps until all ranks agree to stop."""
        agreement = 0
        while True:
            began = time.perf_counter()
            self._take_mail()
            # A paused rank keeps its work to itself; once all are paused, nobody has any and all park.
            has_work = self._scheduler.has_work and not self._mailbox.paused
            step = self._scheduler.schedule() if has_work else _NO_WORK
            scheduled = time.perf_counter()
            agreed = self._agree([step.num_tokens, has_work, self._mailbox.stopping])
            agreement += 1
            self.stats.schedule_s += scheduled - began
            self.stats.agree_s += time.perf_counter() - scheduled
            if any(stopping for _, _, stopping in agreed):
                return
            if any(work for _, work, _ in agreed):
                self._run_step(step, tuple(tokens for tokens, _, _ in agreed))
            else:
                self.stats.parkings += 1
                self._mailbox.park(agreement, self._scheduler.has_work, self._wake_peers)

    def _run_step(self, step: ScheduledStep, token_counts: tuple[int, ...]) -> None:
        began = time.perf_counter()
        result = self._runner.run(step, self._dispatcher_for_step(token_counts))
        ran = time.perf_counter()
        if step is not _NO_WORK:
            self._scheduler.update(step, result.token_ids)
        self._delivery.take(self._scheduler, step, result)
        self._deliver()
        stats = self.stats
        stats.steps += 1
        stats.generation_tokens += len(result.token_ids)
        stats.prompt_tokens += step.num_tokens - step.num_decodes
        stats.run_s += ran - began
        stats.deliver_s += time.perf_counter() - ran

    def _take_mail(self) -> None:
        mail = self._mailbox.take()
        for driver, request in mail.submitted:
            try:
                self._delivery.open(self._scheduler.add(request), driver)
                self._open_samples[request.request_id] += 1
            except MoeRuntimeError as error:
                # Only this request is at fault; the driver checks what it can before it sends one.
                self._server.refuse(driver, Refused(request.request_id, type(error).__name__, str(error)))
        for request_id in mail.aborted:
            for sequence in self._scheduler.abort(request_id):
                self._delivery.end(sequence)
        if mail.aborted:
            self._deliver()

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
