"""Delivery: what a rank's sequences have produced and the driver has not seen: tokens, text, logprobs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from moe_runtime.request import Logprob, OutputDelta, PromptLogprobs
from moe_runtime.runner import StepResult
from moe_runtime.sampling.logprobs import RankedLogprobs
from moe_runtime.scheduler import ScheduledEntry, ScheduledStep, Scheduler, Sequence
from moe_runtime.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer
from moe_runtime.transport.wire import Deltas, Tokens


class Delivery:
    """Text and stop strings of every sequence of one rank; pieces wait here until `drain`.

    A step gives most sequences one token and nothing else to say; these go the short way, into columns.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[Sequence, _Stream] = {}
        self._tokens: defaultdict[str, Tokens] = defaultdict(Tokens)  # by driver
        self._changed: dict[Sequence, _Stream] = {}  # in the order in which they got more than a token
        self._waiting: dict[Sequence, _Stream] = {}  # their tokens go with the next message to their driver

    def open(self, sequence: Sequence, driver: str, arrived: float) -> None:
        """Expect tokens of a sequence, which came at `arrived`; they are for `driver`."""
        self._streams[sequence] = _Stream(sequence, driver, self._tokenizer, arrived)

    def begin(self, chunks: Iterable[ScheduledEntry], now: float) -> None:
        """These were scheduled at `now`, by the clock of `open`; the first time ends a sequence's time in the queue."""
        for chunk in chunks:
            stream = self._streams[chunk.sequence]
            if stream.time_in_queue is None:
                stream.time_in_queue = now - stream.arrived

    def take(self, scheduler: Scheduler, step: ScheduledStep, result: StepResult) -> None:
        """Take a step's result after the scheduler has; ends sequences whose text holds a stop string.

        The last step's pieces have been drained, and those that failed were dropped.
        """
        for sequence, ranked in result.prompt_logprobs.items():
            if sequence in result.failed:
                continue
            self._streams[sequence].add_prompt_logprobs(ranked)
        sampled = zip(step.sampled, result.token_ids, result.logprobs, strict=True)
        for sequence, token_id, logprobs in (
            sampled if not result.failed else _without_failed(sampled, result)
        ):
            stream = self._streams[sequence]
            if stream.is_simple and sequence.finish_reason is None:
                tokens = self._tokens[stream.driver]
                tokens.request_ids.append(stream.request_id)
                tokens.sample_indices.append(stream.sample_index)
                tokens.token_ids.append(token_id)
                tokens.texts.append(stream.text.append(token_id) if stream.text is not None else "")
                continue
            stop = stream.add_token(token_id, logprobs)
            if stop is not None:
                scheduler.finish(sequence, "stop", stop)
            (self._changed if stream.is_due else self._waiting)[sequence] = stream

    def drop(self, sequence: Sequence) -> str:
        """Forget a sequence that failed, and what it has not delivered; returns its driver."""
        self._changed.pop(sequence, None)
        self._waiting.pop(sequence, None)
        return self._streams.pop(sequence).driver

    def end(self, sequence: Sequence) -> None:
        """Report the end of a sequence that was ended from outside."""
        self._changed[sequence] = self._streams[sequence]

    def drain(self) -> dict[str, Deltas]:
        """Everything new by driver, each sequence at most once; finished sequences are forgotten."""
        if self._waiting:
            self._send_along()
        if not self._changed:
            found = {driver: Deltas([], tokens) for driver, tokens in self._tokens.items()}
        else:
            drivers = dict.fromkeys([*self._tokens, *(stream.driver for stream in self._changed.values())])
            found = {driver: Deltas([], self._tokens[driver]) for driver in drivers}
        for sequence, stream in self._changed.items():
            found[stream.driver].deltas.append(stream.drain())
            if sequence.finish_reason is not None:
                del self._streams[sequence]
        self._changed, self._tokens = {}, defaultdict(Tokens)
        return found

    def _send_along(self) -> None:
        """What waits for a message to its driver goes with one that is due."""
        drivers = {*self._tokens, *(stream.driver for stream in self._changed.values())}
        due = {sequence: stream for sequence, stream in self._waiting.items() if stream.driver in drivers}
        for sequence in due:
            del self._waiting[sequence]
        self._changed |= due


def _without_failed(
    sampled: Iterable[tuple[Sequence, int, RankedLogprobs | None]], result: StepResult
) -> Iterator[tuple[Sequence, int, RankedLogprobs | None]]:
    return (entry for entry in sampled if entry[0] not in result.failed)


class _Stream:
    """One sequence's output since the last delta."""

    def __init__(self, sequence: Sequence, driver: str, tokenizer: Tokenizer | None, arrived: float) -> None:
        request, params = sequence.request, sequence.request.params
        self.driver = driver
        self.request_id = request.request_id
        self.sample_index = request.sample_index
        self.arrived = arrived
        self.time_in_queue: float | None = None
        # A token of it has nothing to say but its text, between the first and the last.
        self.is_simple = False
        self._wants_text_alone = (
            not params.stop
            and params.logprobs is None
            and params.prompt_logprobs is None
            and request.stream_interval == 1
        )
        self._has_begun = False
        self._sequence = sequence
        self._tokenizer = tokenizer
        self.text: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self.text = IncrementalDetokenizer(
                tokenizer, request.prompt_token_ids, params.skip_special_tokens
            )
        assert not isinstance(params.stop, str), "SamplingParams keeps stop strings as a tuple"
        self._stop = StopChecker(params.stop or (), params.include_stop_str_in_output)
        self._cumulative_logprob = 0.0
        # The first prompt token is predicted by nothing.
        self._prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
        self._new_ids: list[int] = []
        self._new_text = ""
        self._new_logprobs: list[dict[int, Logprob]] = []

    @property
    def is_due(self) -> bool:
        """Whether what is new is to be sent now."""
        sequence = self._sequence
        is_full = len(self._new_ids) >= sequence.request.stream_interval
        return is_full or not self._has_begun or sequence.finish_reason is not None

    def add_prompt_logprobs(self, ranked: list[RankedLogprobs]) -> None:
        assert self._prompt_logprobs is not None
        self._prompt_logprobs.extend(map(self._logprobs, ranked))

    def add_token(self, token_id: int, ranked: RankedLogprobs | None) -> str | None:
        """Take a sampled token; returns the stop string that its text completes, if any."""
        self._new_ids.append(token_id)
        if ranked is not None:
            self._new_logprobs.append(self._logprobs(ranked))
            self._cumulative_logprob += ranked[token_id][0]
        if self.text is None:
            return None
        sequence, params = self._sequence, self._sequence.request.params
        # As in vLLM, the token that ends a sequence belongs to its tokens but not to its text.
        silent = sequence.finish_reason == "stop" and not params.include_stop_str_in_output
        delta = "" if silent else self.text.append(token_id)
        may_stop = len(sequence.output_ids) >= params.min_tokens
        self._new_text += self._stop.append(delta, check=may_stop)
        if sequence.finish_reason is not None and self._stop.stopped_by is None:
            self._new_text += self._stop.append(self.text.flush(), check=may_stop) + self._stop.flush()
        return self._stop.stopped_by

    def drain(self) -> OutputDelta:
        sequence = self._sequence
        wants_logprobs = sequence.request.params.logprobs is not None
        is_first = not self._has_begun and self.time_in_queue is not None
        delta = OutputDelta(
            request_id=self.request_id,
            sample_index=self.sample_index,
            new_token_ids=tuple(self._new_ids),
            text=self._new_text,
            logprobs=tuple(self._new_logprobs) if wants_logprobs else None,
            prompt_logprobs=self._prompt_logprobs,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            time_in_queue=self.time_in_queue if is_first else None,
            # A replayed sequence may find some of its output there too.
            num_cached_tokens=min(sequence.num_cached_tokens, len(sequence.request.prompt_token_ids))
            if is_first
            else None,
        )
        self._has_begun, self.is_simple = True, self._wants_text_alone
        self._new_ids, self._new_text, self._new_logprobs, self._prompt_logprobs = [], "", [], None
        return delta

    def _logprobs(self, ranked: RankedLogprobs) -> dict[int, Logprob]:
        decode = self._tokenizer.token if self._tokenizer else lambda _: None
        return {token: Logprob(value, rank, decode(token)) for token, (value, rank) in ranked.items()}
