"""Ledger: the driver's record of its requests, from which the pieces that ranks deliver become outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.request import (
    CompletionOutput,
    EngineRequest,
    FinishReason,
    Logprob,
    OutputDelta,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)


@dataclass(slots=True)
class _Sample:
    """One continuation of a prompt as far as it has come."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class _Entry:
    """One request: its prompt, and its samples by index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    samples: list[_Sample]
    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    time_in_queue: float | None = None
    num_cached_tokens: int | None = None  # the least of its samples: others may find what the first one left
    prompt_logprobs: PromptLogprobs | None = None


class Ledger:
    """Requests in the order they were added; entries stay until the ledger goes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries: dict[str, _Entry] = {}
        self._clock = clock

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request_id: str, prompt: str | None, samples: Sequence[EngineRequest]) -> None:
        """Record a request by its samples (one EngineRequest each, in order of their index)."""
        first = samples[0]
        self._entries[request_id] = _Entry(
            request_id,
            prompt,
            list(first.prompt_token_ids),
            first.params,
            [_Sample() for _ in samples],
            first.arrival_time,
        )

    def apply(self, delta: OutputDelta) -> RequestOutput | None:
        """Record a delivered piece; returns the whole output when it was the request's last."""
        entry = self._entries[delta.request_id]
        sample = entry.samples[delta.sample_index]
        sample.text.append(delta.text)
        sample.token_ids.extend(delta.new_token_ids)
        sample.cumulative_logprob = delta.cumulative_logprob or 0.0
        if delta.logprobs is not None:
            sample.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            entry.prompt_logprobs = delta.prompt_logprobs
        if entry.first_token_time is None and delta.new_token_ids:
            entry.first_token_time = self._clock()
        if delta.time_in_queue is not None:
            entry.time_in_queue = max(entry.time_in_queue or 0.0, delta.time_in_queue)
        entry.num_cached_tokens = fewest_cached(entry.num_cached_tokens, delta)
        if delta.finish_reason is None:
            return None
        sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
        if not all(s.finish_reason for s in entry.samples):
            return None
        entry.finished_time = self._clock()
        return self._output(entry)

    def outputs(self) -> Iterable[RequestOutput]:
        """Every request's output as it stands, in the order of `add`."""
        return [self._output(entry) for entry in self._entries.values()]

    def _output(self, entry: _Entry) -> RequestOutput:
        wants_logprobs = entry.params.logprobs is not None
        completions = [
            CompletionOutput(
                index=index,
                text="".join(sample.text),
                token_ids=list(sample.token_ids),
                cumulative_logprob=sample.cumulative_logprob if wants_logprobs else None,
                logprobs=list(sample.logprobs) if wants_logprobs else None,
                finish_reason=sample.finish_reason,
                stop_reason=sample.stop_reason,
            )
            for index, sample in enumerate(entry.samples)
        ]
        return RequestOutput(
            request_id=entry.request_id,
            prompt=entry.prompt,
            prompt_token_ids=entry.prompt_token_ids,
            prompt_logprobs=entry.prompt_logprobs,
            outputs=completions,
            finished=all(sample.finish_reason for sample in entry.samples),
            metrics=RequestMetrics(
                arrival_time=entry.arrival_time,
                first_token_time=entry.first_token_time,
                finished_time=entry.finished_time,
                time_in_queue=entry.time_in_queue,
            ),
            num_cached_tokens=entry.num_cached_tokens,
        )


def fewest_cached(so_far: int | None, delta: OutputDelta) -> int | None:
    """What the samples of a request so far found cached of their prompt, at the least."""
    found = delta.num_cached_tokens
    return so_far if found is None else found if so_far is None else min(so_far, found)
