"""Delivery: what a rank's sequences have produced and the driver has not seen: tokens, text, logprobs."""

from __future__ import annotations

from moe_runtime.request import Logprob, OutputDelta, PromptLogprobs
from moe_runtime.runner import StepResult
from moe_runtime.sampling.logprobs import RankedLogprobs
from moe_runtime.scheduler import ScheduledStep, Scheduler, Sequence
from moe_runtime.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer


class Delivery:
    """Text and stop strings of every sequence of one rank; pieces wait here until `drain`."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[Sequence, _Stream] = {}
        self._changed: dict[Sequence, _Stream] = {}  # in the order in which they got something new

    def open(self, sequence: Sequence) -> None:
        """Expect tokens of a sequence."""
        self._streams[sequence] = _Stream(sequence, self._tokenizer)

    def take(self, scheduler: Scheduler, step: ScheduledStep, result: StepResult) -> None:
        """Take a step's result after the scheduler has; ends sequences whose text holds a stop string."""
        for sequence, ranked in result.prompt_logprobs.items():
            self._streams[sequence].add_prompt_logprobs(ranked)
        for sequence, token_id, logprobs in zip(step.sampled, result.token_ids, result.logprobs, strict=True):
            stream = self._streams[sequence]
            stop = stream.add_token(token_id, logprobs)
            if stop is not None:
                scheduler.finish(sequence, "stop", stop)
            self._changed[sequence] = stream

    def end(self, sequence: Sequence) -> None:
        """Report the end of a sequence that was ended from outside."""
        self._changed[sequence] = self._streams[sequence]

    def drain(self) -> list[OutputDelta]:
        """Everything new, one delta a sequence; finished sequences are forgotten."""
        deltas = [stream.drain() for stream in self._changed.values()]
        for sequence in self._changed:
            if sequence.finish_reason is not None:
                del self._streams[sequence]
        self._changed = {}
        return deltas


class _Stream:
    """One sequence's output since the last delta."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        params = sequence.request.params
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._text: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._text = IncrementalDetokenizer(
                tokenizer, sequence.request.prompt_token_ids, params.skip_special_tokens
            )
        assert not isinstance(params.stop, str), "SamplingParams keeps stop strings as a tuple"
        self._stop = StopChecker(params.stop or (), params.include_stop_str_in_output)
        self._cumulative_logprob = 0.0
        # The first prompt token is predicted by nothing.
        self._prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
        self._new_ids: list[int] = []
        self._new_text = ""
        self._new_logprobs: list[dict[int, Logprob]] = []

    def add_prompt_logprobs(self, ranked: list[RankedLogprobs]) -> None:
        assert self._prompt_logprobs is not None
        self._prompt_logprobs.extend(map(self._logprobs, ranked))

    def add_token(self, token_id: int, ranked: RankedLogprobs | None) -> str | None:
        """Take a sampled token; returns the stop string that its text completes, if any."""
        self._new_ids.append(token_id)
        if ranked is not None:
            self._new_logprobs.append(self._logprobs(ranked))
            self._cumulative_logprob += ranked[token_id][0]
        if self._text is None:
            return None
        sequence, params = self._sequence, self._sequence.request.params
        # As in vLLM, the token that ends a sequence belongs to its tokens but not to its text.
        silent = sequence.finish_reason == "stop" and not params.include_stop_str_in_output
        delta = "" if silent else self._text.append(token_id)
        may_stop = len(sequence.output_ids) >= params.min_tokens
        self._new_text += self._stop.append(delta, check=may_stop)
        if sequence.finish_reason is not None and self._stop.stopped_by is None:
            self._new_text += self._stop.append(self._text.flush(), check=may_stop) + self._stop.flush()
        return self._stop.stopped_by

    def drain(self) -> OutputDelta:
        sequence = self._sequence
        wants_logprobs = sequence.request.params.logprobs is not None
        delta = OutputDelta(
            request_id=sequence.request.request_id,
            sample_index=sequence.request.sample_index,
            new_token_ids=tuple(self._new_ids),
            text=self._new_text,
            logprobs=tuple(self._new_logprobs) if wants_logprobs else None,
            prompt_logprobs=self._prompt_logprobs,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        self._new_ids, self._new_text, self._new_logprobs, self._prompt_logprobs = [], "", [], None
        return delta

    def _logprobs(self, ranked: RankedLogprobs) -> dict[int, Logprob]:
        decode = self._tokenizer.token if self._tokenizer else lambda _: None
        return {token: Logprob(value, rank, decode(token)) for token, (value, rank) in ranked.items()}
