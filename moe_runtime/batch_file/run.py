"""run_batch: have many requests answered at once, and each answer written as it comes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_runtime.batch_file.answers import Answer, AnswerFile
from moe_runtime.batch_file.requests import BatchRequest
from moe_runtime.errors import MoeRuntimeError

# Answers a request: given its url and body. A MoeRuntimeError ends the whole batch; any other concerns the request.
Handle = Callable[[str, dict[str, Any]], Awaitable[Answer]]

# Statuses of a server that may answer the same request a little later, and how long it is given.
_RETRIED = (429, 503)
_RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)


@dataclass(slots=True)
class BatchSummary:
    """What became of a batch, so far."""

    total: int  # requests in the input
    skipped: int  # of these, answered by an earlier run
    answered: int = 0  # by this run
    failures: Counter[str] = field(default_factory=Counter)  # by status, or "no answer"

    @property
    def failed(self) -> int:
        """Requests that this run tried in vain."""
        return self.failures.total()

    def __str__(self) -> str:
        text = f"{self.answered} of {self.total} requests answered"
        if self.skipped:
            text += f", {self.skipped} by an earlier run"
        if self.failures:
            reasons = ", ".join(f"{count} with {reason}" for reason, count in sorted(self.failures.items()))
            text += f", {self.failed} failed ({reasons})"
        missing = self.total - self.skipped - self.answered - self.failed
        return text + (f", {missing} left" if missing else "")


async def run_batch(
    requests: Iterable[BatchRequest],
    handle: Handle,
    output: AnswerFile,
    summary: BatchSummary,
    *,
    concurrency: int,
    on_done: Callable[[bool], None] = lambda ok: None,
    retry_delays_s: Sequence[float] = _RETRY_DELAYS_S,
) -> None:
    """Answer the requests that `output` has no answer to; `summary` is kept up to date.

    Args:
        concurrency: requests that are at work at once.
        on_done: called after each request, with whether it was answered without an error.
        retry_delays_s: before each further try of a request that the server is too busy for.

    Raises:
        MoeRuntimeError: from `handle`; requests at work are given up and stay unanswered.
    """
    waiting = iter(request for request in requests if request.custom_id not in output.answered)

    async def work(mine: Iterator[BatchRequest]) -> None:
        for request in mine:  # shared by all workers: each takes the next one
            answer = await _answer(handle, request, retry_delays_s)
            output.write(request.custom_id, answer)
            if answer.ok:
                summary.answered += 1
            else:
                summary.failures[_reason(answer)] += 1
            on_done(answer.ok)

    workers = [asyncio.create_task(work(waiting)) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _answer(handle: Handle, request: BatchRequest, retry_delays_s: Sequence[float]) -> Answer:
    try:
        answer = await handle(request.url, request.body)
        for delay_s in retry_delays_s:
            if answer.status not in _RETRIED:
                break
            await asyncio.sleep(delay_s)
            answer = await handle(request.url, request.body)
    except MoeRuntimeError:
        raise
    except Exception as error:
        return Answer(status=None, error=f"{type(error).__name__}: {error}")
    return answer


def _reason(answer: Answer) -> str:
    return "no answer" if answer.status is None else f"status {answer.status}"
