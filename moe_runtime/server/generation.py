"""Generation: all prompts of one HTTP request, run together; what comes of them is taken in batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from types import TracebackType
from typing import Self

from moe_runtime.outputs import fewest_cached
from moe_runtime.request import OutputDelta, SamplingParams, TokensPrompt
from moe_runtime.server.errors import ApiError
from moe_runtime.server.state import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt, checked and tokenized."""

    text: str | None  # None: the client gave token ids
    token_ids: list[int]
    params: SamplingParams


# The job's index and a piece of one of its completions.
Piece = tuple[int, OutputDelta]


class Generation:
    """An async context manager: entering it sends the prompts, leaving it aborts what has not ended."""

    def __init__(
        self,
        state: ServerState,
        jobs: list[Job],
        *,
        request_id: str,
        arrival_time: float,
        priority: int = 0,
    ) -> None:
        """
        Args:
            request_id: must not be in use.
            arrival_time: of the HTTP request, in seconds of time.monotonic; its time-out counts from there.
        """
        self._state = state
        self._engine = state.engine
        self._jobs = jobs
        self._priority = priority
        self._request_id = request_id
        self._arrival_time = arrival_time
        self._arrived: list[Piece] = []
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._num_open = len(jobs)
        self._num_cached: list[int | None] = [None] * len(jobs)
        self._pumps: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._pumps = [asyncio.create_task(self._pump(index)) for index in range(len(self._jobs))]
        self._state.generations.add(self)
        timeout_s = self._state.config.request_timeout_s
        if timeout_s is not None:
            left_s = self._arrival_time + timeout_s - time.monotonic()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(left_s, 0), self.fail, _timed_out(timeout_s))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.generations.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of all prompts that were found in the prefix cache, as far as is known yet."""
        return sum(found or 0 for found in self._num_cached)

    async def whole(self) -> dict[tuple[int, int], OutputDelta]:
        """Wait for the end; all of each completion, by job and sample. Raises what `next_batch` raises."""
        deltas: dict[tuple[int, int], list[OutputDelta]] = {}
        while batch := await self.next_batch():
            for job, delta in batch:
                deltas.setdefault((job, delta.sample_index), []).append(delta)
        return {key: join(pieces) for key, pieces in sorted(deltas.items(), key=itemgetter(0))}

    async def next_batch(self) -> list[Piece]:
        """Wait for something new; all of it, with at most one piece a completion. Empty after the last.

        Raises:
            MoeRuntimeError: the engine could not serve a prompt.
            ApiError: the request took too long, or was failed from outside.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                return []
            self._wake.clear()
            await self._wake.wait()
        arrived, self._arrived = self._arrived, []
        return arrived if len(arrived) == 1 else _merged(arrived)

    def fail(self, error: Exception) -> None:
        """Abort what has not ended; `next_batch` raises `error` once what has arrived was taken."""
        if self._error is None:
            self._error = error
            self._cancel()
            self._wake.set()

    def _cancel(self) -> None:
        for pump in self._pumps:
            pump.cancel()

    async def _pump(self, index: int) -> None:
        """Carry one prompt's pieces from the engine."""
        job = self._jobs[index]
        prompt: TokensPrompt = {"prompt_token_ids": job.token_ids}
        request_id = self._request_id if len(self._jobs) == 1 else f"{self._request_id}-{index}"
        try:
            pieces = self._engine.stream(prompt, job.params, request_id, priority=self._priority)
            async for delta in pieces:
                self._num_cached[index] = fewest_cached(self._num_cached[index], delta)
                self._arrived.append((index, delta))
                self._wake.set()
        except Exception as raised:
            self.fail(raised)
        finally:
            self._num_open -= 1
            self._wake.set()


def _timed_out(timeout_s: float) -> ApiError:
    return ApiError(
        504,
        f"the request took more than {timeout_s:g} s and was aborted; ask for fewer tokens, or raise "
        "--request-timeout",
        kind="timeout_error",
        code="request_timeout",
    )


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Pieces of the same completion become one; in the order in which the completions first appear."""
    of_completion: dict[tuple[int, int], list[OutputDelta]] = {}
    for job, delta in pieces:
        of_completion.setdefault((job, delta.sample_index), []).append(delta)
    return [(job, join(deltas)) for (job, _), deltas in of_completion.items()]


def join(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """One piece that says what these, in order and of one completion, say; there must be one at least."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return OutputDelta(
        request_id=last.request_id,
        sample_index=last.sample_index,
        new_token_ids=tuple(chain.from_iterable(delta.new_token_ids for delta in deltas)),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        cumulative_logprob=last.cumulative_logprob,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        time_in_queue=deltas[0].time_in_queue,
        num_cached_tokens=deltas[0].num_cached_tokens,
    )
