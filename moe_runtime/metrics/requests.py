"""RequestRecorder: the RequestObserver that keeps latencies and lengths of requests as Prometheus metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Histogram, Metric
from prometheus_client.registry import Collector

from moe_runtime.metrics.names import LATENCY_BUCKETS, LENGTH_BUCKETS, PREFIX, TOKEN_LATENCY_BUCKETS
from moe_runtime.request import EngineRequest, OutputDelta

FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(slots=True)
class _Open:
    """A sample that has not ended."""

    num_prompt_tokens: int
    arrived: float
    first: float | None = None  # when its first token came
    last: float = 0.0  # when its latest came
    num_tokens: int = 0
    time_in_queue: float = 0.0


class RequestRecorder(Collector):
    """One observer of a driver's requests. See RequestObserver for when it is called."""

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: the one that `EngineRequest.arrival_time` is of.
        """
        self._clock = clock
        self._open: dict[str, dict[int, _Open]] = {}
        self._touched = threading.Event()
        self._families: list[Histogram | Counter] = []

        def histogram(name: str, text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
            made = Histogram(PREFIX + name, text, ["model_name"], registry=None, buckets=buckets)
            self._families.append(made)
            return made.labels(model_name)

        self._to_first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram(
            "inter_token_latency_seconds", "Between two tokens of a sample.", TOKEN_LATENCY_BUCKETS
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a sample's tokens after its first.",
            TOKEN_LATENCY_BUCKETS,
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = histogram("request_queue_time_seconds", "In a rank's queue, until first scheduled.")
        self._prefill = histogram("request_prefill_time_seconds", "From first scheduled to the first token.")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self._inference = histogram(
            "request_inference_time_seconds", "From first scheduled to the last token."
        )
        self._prompt = histogram("request_prompt_tokens", "Tokens of a sample's prompt.", LENGTH_BUCKETS)
        self._generated = histogram("request_generation_tokens", "Tokens generated.", LENGTH_BUCKETS)
        success = Counter(
            f"{PREFIX}request_success",
            "Samples that ended.",
            ["model_name", "finished_reason"],
            registry=None,
        )
        self._families.append(success)
        self._ended = {reason: success.labels(model_name, reason) for reason in FINISH_REASONS}

    def collect(self) -> Iterator[Metric]:
        """Every family, without the times at which its series were made."""
        for made in self._families:
            for family in made.collect():
                family.samples = [s for s in family.samples if not s.name.endswith("_created")]
                yield family

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def take_activity(self) -> bool:
        """Whether any request was in flight since this was asked last."""
        active = bool(self._open) or self._touched.is_set()
        self._touched.clear()
        return active

    # ----------------------------------------------------------------- RequestObserver

    def on_arrival(self, samples: Sequence[EngineRequest]) -> None:
        """See RequestObserver."""
        self._open[samples[0].request_id] = {
            sample.sample_index: _Open(len(sample.prompt_token_ids), sample.arrival_time)
            for sample in samples
        }
        self._touched.set()

    def on_deltas(self, deltas: Sequence[OutputDelta]) -> None:
        """See RequestObserver."""
        now = self._clock()
        for delta in deltas:
            samples = self._open.get(delta.request_id)
            sample = samples.get(delta.sample_index) if samples else None
            if samples is None or sample is None:
                continue
            if delta.time_in_queue is not None:
                sample.time_in_queue = delta.time_in_queue
            if delta.new_token_ids:
                self._count_tokens(sample, len(delta.new_token_ids), now)
            if delta.finish_reason is not None:
                self._end(samples, delta.sample_index, delta.finish_reason, now)
                if not samples:
                    self._open.pop(delta.request_id, None)

    def on_error(self, request_id: str) -> None:
        """See RequestObserver."""
        samples = self._open.pop(request_id, {})
        for index in list(samples):
            self._end(samples, index, "error", self._clock())

    def _count_tokens(self, sample: _Open, num_tokens: int, now: float) -> None:
        if sample.first is None:
            sample.first = now
            self._to_first.observe(now - sample.arrived)
        else:
            self._between.observe(now - sample.last)
        sample.last = now
        sample.num_tokens += num_tokens

    def _end(self, samples: dict[int, _Open], index: int, reason: str, now: float) -> None:
        sample = samples.pop(index, None)  # whoever gets it counts it
        if sample is None:
            return
        self._touched.set()
        self._ended[reason].inc()
        self._prompt.observe(sample.num_prompt_tokens)
        self._generated.observe(sample.num_tokens)
        self._whole.observe(now - sample.arrived)
        if sample.first is None:
            return
        self._queue.observe(sample.time_in_queue)
        self._prefill.observe(max(0.0, sample.first - sample.arrived - sample.time_in_queue))
        self._decode.observe(sample.last - sample.first)
        self._inference.observe(max(0.0, sample.last - sample.arrived - sample.time_in_queue))
        if sample.num_tokens > 1:
            self._per_token.observe((sample.last - sample.first) / (sample.num_tokens - 1))
