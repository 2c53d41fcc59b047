"""From records of requests to the numbers that vLLM's client reports, by its definitions. Pure functions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from moe_runtime.bench.serving.answer import RequestRecord
from moe_runtime.errors import ConfigError, did_you_mean

# Names as vLLM writes them, and what they stand for.
METRICS: Mapping[str, tuple[str, str]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one latency, in milliseconds; zeros where there is no sample."""

    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeMetrics:
    """What a run measured."""

    completed: int
    failed: int
    first_error: str | None
    duration_s: float  # from the first arrival planned to the last answer
    total_input_tokens: int
    total_output_tokens: int
    uncounted: int  # answers whose pieces were counted, for want of the server's usage
    request_throughput: float  # a second, as all below but the peaks' and delays' own units
    request_goodput: float | None  # None: no objectives were given
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float  # of the busiest whole second
    max_concurrent_requests: int
    latencies: Mapping[str, Distribution]
    send_delay: Distribution  # between when a request should have been sent and when it was

    def to_dict(self) -> dict[str, Any]:
        """By vLLM's names; latencies in milliseconds."""
        names = ("duration_s", "uncounted", "latencies", "send_delay")
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in names}
        result = {"duration": self.duration_s, **plain, "outputs_counted_by_chunks": self.uncounted}
        for name, values in {**self.latencies, "send_delay": self.send_delay}.items():
            for kind in ("mean", "median", "std"):
                result[f"{kind}_{name}_ms"] = getattr(values, kind)
            for percent, value in values.percentiles.items():
                result[f"p{percent:g}_{name}_ms"] = value
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}


def compute_metrics(
    records: Sequence[RequestRecord],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput_ms: Mapping[str, float] | None = None,
) -> ServeMetrics:
    """Numbers of a run that took `duration_s`; requests that failed count as failed and nowhere else."""
    good = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    output_tokens = sum(record.output_tokens for record in good)
    input_tokens = sum(record.prompt_tokens for record in good)
    tpots = [tpot for record in good if (tpot := record.tpot_s) is not None]
    samples = {
        "ttft": [record.ttft_s for record in good],
        "tpot": tpots,
        "itl": [gap for record in good for gap in record.itls_s],
        "e2el": [record.e2el_s for record in good],
    }
    delays = [record.sent_s - record.planned_s for record in records]
    return ServeMetrics(
        completed=len(good),
        failed=len(errors),
        first_error=errors[0] if errors else None,
        duration_s=duration_s,
        total_input_tokens=input_tokens,
        total_output_tokens=output_tokens,
        uncounted=sum(not record.counted_by_server for record in good),
        request_throughput=len(good) / duration_s,
        request_goodput=sum(meets(r, goodput_ms) for r in good) / duration_s if goodput_ms else None,
        output_throughput=output_tokens / duration_s,
        total_token_throughput=(input_tokens + output_tokens) / duration_s,
        max_output_tokens_per_s=_busiest_second(good),
        max_concurrent_requests=peak_concurrency(records),
        latencies={name: _distribution(values, percentiles) for name, values in samples.items()},
        send_delay=_distribution(delays, percentiles),
    )


def meets(record: RequestRecord, goodput_ms: Mapping[str, float]) -> bool:
    """Whether a request kept to every objective; one that had no second token keeps to any `tpot`."""
    measured_s = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
    return all(measured_s[name] * 1e3 <= limit for name, limit in goodput_ms.items())


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """Objectives from `["ttft:500", "tpot:50"]`, in milliseconds.

    Raises:
        ConfigError: a pair is malformed, or names what has no objective.
    """
    found: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in GOODPUT_METRICS:
            raise ConfigError(
                f"--goodput {pair}: wanted one of {', '.join(GOODPUT_METRICS)} and milliseconds, "
                f"such as ttft:500{did_you_mean(name, GOODPUT_METRICS)}"
            )
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not limit >= 0:
            raise ConfigError(f"--goodput {pair}: wanted milliseconds of at least 0, such as {name}:500")
        found[name] = limit
    return found


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, with linear interpolation between two, as numpy's default."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Most requests that were in flight at once; one that ends as another is sent is not with it."""
    changes = sorted([(r.ended_s, -1) for r in records] + [(r.sent_s, 1) for r in records])
    return max(accumulate(change for _, change in changes), default=0)


def _busiest_second(records: Sequence[RequestRecord]) -> float:
    """Output tokens of the whole second that had most; a request's tokens are spread over its pieces."""
    tokens: defaultdict[int, float] = defaultdict(float)
    for record in records:
        weight = record.output_tokens / len(record.chunk_times_s)
        for time_s in record.chunk_times_s:
            tokens[int(time_s)] += weight
    return max(tokens.values(), default=0.0)


def _distribution(seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    if not seconds:
        return Distribution(0.0, 0.0, 0.0, dict.fromkeys(percentiles, 0.0))
    ms = sorted(value * 1e3 for value in seconds)
    mean = math.fsum(ms) / len(ms)
    return Distribution(
        mean=mean,
        median=percentile(ms, 50),
        std=math.sqrt(math.fsum((value - mean) ** 2 for value in ms) / len(ms)),
        percentiles={percent: percentile(ms, percent) for percent in percentiles},
    )
